"""The training loss on held-out images, measured the same way every time."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from config import DiffusionConfig
from data.pixels import to_model_range
from functions.losses import denoising_loss, eps_errors
from functions.prediction import Denoiser
from functions.support.processes import Processes
from functions.support.random_numbers import ImageNoise, generator_of


@torch.no_grad()
def validation_losses(
    denoisers: list[Denoiser],
    load_images: Callable[[np.ndarray], Tensor],
    indices: np.ndarray,
    config: DiffusionConfig,
    processes: Processes,
) -> list[list[float]]:
    """Return each denoiser's mean loss (Eq. 14) and the mean error of eps that belongs to it.

    The means are over `config.validation_samples` fixed triples (image, t, noise), so neither
    batch size nor chance moves them. The losses of two runs can be compared where they have the
    same objective, the errors of eps always.

    The denoisers have the same schedule. `load_images` takes image indices (B,) and returns uint8
    (B, H, W, C) on the denoisers' device. The processes divide the batches, and all get the means.
    """
    scheduler = denoisers[0].scheduler
    samples = config.validation_samples

    # 0 .. T-1 is cut into as many strata as there are samples. Their middles, shuffled, are the t.
    order = torch.randperm(samples, generator=generator_of("cpu", config.seed, "validation t"))
    all_t = (2 * order + 1) * scheduler.timesteps // (2 * samples)
    # Sample j takes the image at j * len(indices) // samples, so all images count equally often,
    # give or take one.
    all_images = indices[np.arange(samples) * len(indices) // samples]

    # The sums stay on the device, so that no batch waits for the one before.
    sums = []
    for start in range(0, samples, config.batch_size)[processes.rank :: processes.count]:
        batch_slice = slice(start, start + config.batch_size)
        x_0 = to_model_range(load_images(all_images[batch_slice]))
        # All t are copied to the device once, with the first batch.
        all_t = all_t.to(x_0.device)
        t = all_t[batch_slice]
        # A sample's noise depends on its number, not on the batch that it is in.
        indices = range(samples)[batch_slice]
        noise = ImageNoise(config.seed, indices, x_0.shape[1:], x_0.device, "validation noise")
        eps = noise.draw()

        for denoiser in denoisers:
            with denoiser.evaluating():
                losses = denoising_loss(denoiser, scheduler, x_0, t, eps)
                errors = eps_errors(denoiser, scheduler, losses, t)
                sums.append(torch.stack([losses, errors]).sum(dim=1))

    # A process without any batch adds zeros.
    total = torch.zeros(len(denoisers), 2, dtype=torch.float64)
    if sums:
        batch_sums = torch.stack(sums).cpu().double().view(-1, len(denoisers), 2)
        total += batch_sums.sum(dim=0)
    means = processes.sum_(total) / samples
    return means.tolist()
