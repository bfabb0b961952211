"""Draw images at twice their size: a model of that size adds the details.

A pixel of the small image is taken as the mean of 2 x 2 pixels of the large one. So of the large
model's x_0 only what such means do not say is used, in each step: DDNM (Wang et al. 2023,
arXiv:2212.00490, Section 3), with the steps of DPM-Solver++. A model that draws small images with
one that enlarges them is a cascade (Ho et al. 2022, arXiv:2106.15282).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from functions.denoiser import Predictor
from functions.noise_scheduler import NoiseScheduler
from functions.samplers import OnStep, dpm_solver_sample
from functions.timesteps import nearest_timesteps

# At this log-SNR noise hides all details of 2 x 2 pixels; more of it would also hide what the small
# image says about them. The steps from there are even in t: even in log-SNR they draw more details,
# but fewer faces look clear (docs/ffhq.md).
FIRST_LOG_SNR = -1.41
ENLARGING_STEPS = 7


@dataclass(frozen=True)
class Enlarger:
    """A model that draws the details of images of half its size."""

    model: Predictor

    @property
    def times(self) -> list[int]:
        """Return the timesteps of an enlargement, and -1."""
        log_snr = torch.tensor([FIRST_LOG_SNR], dtype=torch.float64)
        [first] = nearest_timesteps(self.model.scheduler, log_snr)
        steps = min(ENLARGING_STEPS, first + 1)
        return [round((first + 1) * k / steps) - 1 for k in range(steps, -1, -1)]

    def enlarge(
        self, small: Tensor, noise: Callable[[], Tensor], on_step: OnStep | None = None
    ) -> Tensor:
        """Return images (B, C, 2H, 2W) whose means of 2 x 2 pixels are `small` (B, C, H, W).

        `noise()` draws the next standard normal noise (B, C, 2H, 2W). Clipping changes some means.
        """
        times = self.times
        return dpm_solver_sample(
            Enlarging(self.model, small),
            self.model.scheduler.q_sample(doubled(small), times[0], noise()),
            times,
            eta=1,
            step_noise=lambda k: noise(),
            on_step=on_step,
        )


@dataclass(frozen=True)
class Enlarging(Predictor):
    """A model whose x_0 has the given means of 2 x 2 pixels, before it is clipped."""

    model: Predictor
    # The means: (B, C, H, W) for images of 2H x 2W.
    small: Tensor

    @property
    def scheduler(self) -> NoiseScheduler:
        return self.model.scheduler

    def x_0_and_eps(self, x_t: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """Return the model's x_0 with these means, and the eps that it implies."""
        x_0, _ = self.model.predict(x_t, t)
        x_0 = x_0 + doubled(self.small - F.avg_pool2d(x_0, 2))
        return x_0, self.scheduler.predict_eps(x_t, t, x_0)


def doubled(images: Tensor) -> Tensor:
    """Return images (B, C, H, W) with each pixel as 2 x 2 equal ones."""
    return F.interpolate(images, scale_factor=2.0, mode="nearest")
