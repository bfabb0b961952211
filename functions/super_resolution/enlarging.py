"""Draw images at twice their size: a model that is given the small image draws the details.

The small image is assumed to be the large one, shrunk by Lanczos (details.py). The steps are those
of DPM-Solver++, and their x_0 are details. In each step the image that these make of the small one
is corrected so that it shrinks exactly to that, as in DDNM (Wang et al. 2023, arXiv:2212.00490,
Section 3). A model that draws small images, and models that then enlarge them, are called a cascade
(Ho et al. 2022, arXiv:2106.15282).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from functions.denoiser import Predictor
from functions.noise_scheduler import NoiseScheduler
from functions.samplers import OnStep, dpm_solver_sample
from functions.super_resolution.details import LOG_SNR_SHIFT, STD, details, stretch
from functions.timesteps import nearest_timesteps

# It returns images (B, C, H, W) with what is known of them.
Keep = Callable[[Tensor], Tensor]
# At this log-SNR of images noise hides all that the small image lacks.
FIRST_LOG_SNR = -1.41
ENLARGING_STEPS = 7
# The steps are even in log-SNR, up to LAST_LOG_SNR. But for small images below SMALL_SIZE, where a
# step still decides what a face looks like, they are even in t. With cosine betas the last one is
# then at 3.5, and eyes and teeth are less harsh (pretrained/ffhq-details.md).
LAST_LOG_SNR = 6.0
SMALL_SIZE = 64
# From SMALL_SIZE on, the model gets the small image with noise of this standard deviation, as in
# half of its training (Ho et al. 2022, Section 4). What was drawn is smoother than photos, and
# without noise so are the details of it.
LOW_NOISE = 0.03


def enlarge(
    model: Predictor,
    small: Tensor,
    noise: Callable[[], Tensor],
    keep: Keep | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Return images (B, C, 2H, 2W) that shrink to `small` (B, C, H, W), but for clipping.

    `model` draws the details of images that it is given as `low`, and `noise()` the next standard
    normal noise of the large ones, of one for all or of each. `keep` puts into large images what is
    known of them (functions/sampling/inpainting.py); beside it they do not shrink exactly to the
    small ones.
    """
    size = min(small.shape[-2:])
    times = enlarging_times(model.scheduler, size)
    first = noise()
    low = small
    if size >= SMALL_SIZE:
        # Every second row and column of noise is noise, too.
        low = small + LOW_NOISE * noise()[..., ::2, ::2]
    base = stretch(small)
    # The details begin as noise, but for what is known of the large image.
    known = (keep(base) - base) / STD if keep else torch.zeros_like(base)
    x_0 = dpm_solver_sample(
        Enlarging(model.given(low=low), base, keep),
        model.scheduler.q_sample(known, times[0], first),
        times,
        eta=1,
        # `Enlarging` clips the images.
        clip_x_0=False,
        step_noise=lambda k: noise(),
        on_step=on_step,
    )
    return base + STD * x_0


def enlarging_times(scheduler: NoiseScheduler, size: int) -> list[int]:
    """Return the timesteps of enlarging images whose shorter side has `size` pixels, and -1."""
    steps = min(ENLARGING_STEPS, scheduler.timesteps)
    log_snrs = torch.linspace(FIRST_LOG_SNR, LAST_LOG_SNR, steps, dtype=torch.float64)
    times = nearest_timesteps(scheduler, log_snrs + LOG_SNR_SHIFT)
    if size < SMALL_SIZE:
        count = times[0] + 1
        times = [round(count * k / steps) - 1 for k in range(steps, 0, -1)]
    # A short schedule has not as many.
    return [*sorted({t for t in times if t >= 0}, reverse=True), -1]


@dataclass(frozen=True)
class Enlarging(Predictor):
    """A model of details, whose x_0 is corrected by what is known of the image base + STD x_0."""

    model: Predictor
    # The small image, stretched: (B, C, H, W).
    base: Tensor
    keep: Keep | None

    @property
    def scheduler(self) -> NoiseScheduler:
        return self.model.scheduler

    def estimate(self, x_t: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """Return x_0 and eps. Before `keep` and clipping, the image shrinks to the small one."""
        x_0, _ = self.model.predict(details(x_t), t)
        image = self.base + STD * details(x_0)
        if self.keep:
            image = self.keep(image)
        x_0 = (image.clamp(-1, 1) - self.base) / STD
        return x_0, self.scheduler.predict_eps(x_t, t, x_0)
