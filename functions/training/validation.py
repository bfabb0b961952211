"""The training loss on held-out images, measured the same way every time."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from data.pixels import to_model_range
from functions.losses import denoising_loss, eps_errors
from functions.prediction import Denoiser
from functions.support.processes import Processes
from functions.support.random_numbers import generator_of


@torch.no_grad()
def validation_loss(
    denoiser: Denoiser, images_of: Callable[[np.ndarray], Tensor], indices: np.ndarray, config, processes: Processes
) -> tuple[float, float]:
    """Mean loss (Eq. 14), and the error of eps that belongs to it, over fixed triples (image, t, noise).

    So it is smooth over a run, and comparable between runs; the error of eps also between objectives.

    Sample j takes image j * len(indices) // samples, so all images count equally often (up to one); the t are evenly
    spaced over 0 .. T-1 in a shuffled order; the noise is j's own. So neither batch size nor chance moves the curve.

    Args:
        images_of: image indices (B,) -> uint8 (B, H, W, C), on the network's device.
        indices: the held-out images.
        config: the run's DiffusionConfig: validation_samples, batch_size and seed.
        processes: those that do the work together; each takes some of the batches, and all get the mean.
    """
    scheduler, samples = denoiser.scheduler, config.validation_samples
    order = torch.randperm(samples, generator=generator_of("cpu", config.seed, "validation t"))
    all_t = (2 * order + 1) * scheduler.timesteps // (2 * samples)  # the middle of each of `samples` strata
    all_images = indices[np.arange(samples) * len(indices) // samples]
    total = torch.zeros(2, dtype=torch.float64)
    with denoiser.evaluating():
        for start in range(0, samples, config.batch_size)[processes.rank :: processes.count]:
            x_0 = to_model_range(images_of(all_images[start : start + config.batch_size]))
            t = all_t[start : start + config.batch_size].to(x_0.device)
            noise = torch.stack([
                torch.randn(x_0.shape[1:], generator=generator_of("cpu", config.seed, "validation noise", start + j))
                for j in range(len(x_0))
            ]).to(x_0.device)  # fmt: skip
            losses = denoising_loss(denoiser, scheduler, x_0, t, noise)
            total += torch.stack([losses, eps_errors(denoiser, scheduler, losses, t)]).sum(dim=1).cpu()
    return tuple((processes.sum_(total) / samples).tolist())
