"""Draw an image at twice its size: a model of that size adds the details.

A pixel of the small image is the mean of 2 x 2 pixels of the large one. So of the large model's x_0
only what such means do not say is used, in each step, and the means are those of the small image:
DDNM (Wang et al. 2023, arXiv:2212.00490, Section 3). A model that draws small images with one that
enlarges them is a cascade (Ho et al. 2022, arXiv:2106.15282).
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from functions.denoiser import Predictor
from functions.noise_scheduler import NoiseScheduler

# The steps are even in t, from the middle of the timesteps. More noise would hide what is known.
ENLARGING_STEPS = 7


@dataclass(frozen=True)
class Enlarging(Predictor):
    """A model whose x_0 has the means of 2 x 2 pixels that are given."""

    model: Predictor
    # The means: (B, C, H, W) for images of 2H x 2W.
    small: Tensor

    @property
    def scheduler(self) -> NoiseScheduler:
        return self.model.scheduler

    def x_0_and_eps(self, x_t: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """Return the model's x_0 with these means, and its eps."""
        x_0, _ = self.model.predict(x_t, t)
        x_0 = x_0 + doubled(self.small - F.avg_pool2d(x_0, 2))
        return x_0, self.scheduler.predict_eps(x_t, t, x_0)


def doubled(images: Tensor) -> Tensor:
    """Return images (B, C, H, W) with each pixel as 2 x 2 equal ones."""
    return F.interpolate(images, scale_factor=2.0, mode="nearest")


def enlarging_times(scheduler: NoiseScheduler) -> list[int]:
    """Return the timesteps of an enlargement, from the middle ones down to -1."""
    middle = scheduler.timesteps / 2
    parts = range(ENLARGING_STEPS, -1, -1)
    # Of few timesteps each is taken once.
    return [*dict.fromkeys(round(middle * part / ENLARGING_STEPS) - 1 for part in parts)]
