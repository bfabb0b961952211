"""The training loss on held-out images, measured the same way every time."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from config import DiffusionConfig
from data.batches import batches_of
from data.pixels import to_model_range
from functions.denoiser import OBJECTIVES, Denoiser
from functions.losses import denoising_loss, eps_errors
from functions.support.processes import Processes
from functions.support.random_numbers import ImageNoise, generator_of


@torch.no_grad()
def validation_losses(
    denoisers: list[Denoiser],
    gather: Callable[[np.ndarray], Tensor],
    indices: np.ndarray,
    config: DiffusionConfig,
    processes: Processes,
) -> list[list[float]]:
    """Return each denoiser's mean loss (Eq. 14), the mean error of eps, and four losses by t.

    The last four are the mean losses at the t of each quarter of 0 .. T-1, and their mean is the
    whole loss. They need no sums in checkpoints, as those of the training loss would.

    The means are over `config.validation_samples` fixed triples (image, t, noise), so they do not
    depend on the batch size. Losses can be compared between runs with the same objective, and
    errors of eps between all runs.

    The denoisers have the same schedule. `gather` takes image indices (B,) and returns uint8
    (B, H, W, C) on the denoisers' device. The processes share the batches, and all get the means.
    """
    timesteps = denoisers[0].scheduler.timesteps
    count = config.validation_samples

    # 0 .. T-1 is divided into one stratum per triple. The t are the strata's midpoints, shuffled.
    order = torch.randperm(count, generator=generator_of("cpu", config.seed, "validation t"))
    all_t = (2 * order + 1) * timesteps // (2 * count)
    # The triples are spread evenly over the images: the numbers of triples with any two images
    # differ by at most one.
    all_indices = indices[np.arange(count) * len(indices) // count]

    total = torch.zeros(len(denoisers), 6, dtype=torch.float64)
    batches = batches_of(range(count), config.batch_size)
    for positions in batches[processes.rank :: processes.count]:
        x_0 = to_model_range(gather(all_indices[positions]))
        t = all_t[positions].to(x_0.device)
        # The noise of a triple depends on its position among all triples, not on its batch.
        noise = ImageNoise(config.seed, positions, x_0.shape[1:], x_0.device, "validation noise")
        eps = noise.draw()

        for i, denoiser in enumerate(denoisers):
            with denoiser.evaluating():
                losses = denoising_loss(denoiser, x_0, t, eps)
                errors = eps_errors(denoiser, losses, t)
            # A quarter of the strata are in each quarter.
            quarters = [4 * losses * (4 * t // timesteps == q) for q in range(4)]
            total[i] += torch.stack([losses, errors, *quarters]).sum(dim=1).cpu()

    means = processes.sum_(total) / count
    return means.tolist()


class AverageImage(nn.Module):
    """A network that knows the average image, (1, C, H, W), and t, but does not look at x_t.

    It predicts the average of its target at t. The average noise is 0, so this is 0 for eps, and
    -sqrt(1 - alpha_bar) times the average image for v. A network that looks at x_t, too, but only
    to compute eps from it and the average image, has a loss of 20 with cosine betas: at small t,
    it takes each detail of an image for noise.

    The schedule and the objective are those of `denoiser`.
    """

    def __init__(self, denoiser: Denoiser, average: Tensor):
        super().__init__()
        self.scheduler = denoiser.scheduler
        self.target = OBJECTIVES[denoiser.objective].target
        self.average = average

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the prediction, (B, C, H, W)."""
        average = self.average.expand_as(x_t)
        return self.target(self.scheduler, average, t, torch.zeros_like(x_t))


def average_image(
    gather: Callable[[np.ndarray], Tensor], indices: np.ndarray, batch_size: int
) -> Tensor:
    """Return the average of the images with these indices: float32 (1, C, H, W) in [-1, 1].

    `gather` is that of `validation_losses`.
    """
    # The sum of uint8 is int64, and exact.
    total = sum(gather(batch).sum(dim=0, keepdim=True) for batch in batches_of(indices, batch_size))
    return to_model_range(total / len(indices))
