"""The training loss on held-out images, measured the same way every time."""

from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
import torch

from data.pixels import to_model_range
from functions.losses import denoising_loss, eps_errors
from functions.prediction import Denoiser
from functions.support.processes import Processes
from functions.support.random_numbers import ImageNoise, generator_of


@torch.no_grad()
def validation_losses(
    denoisers: list[Denoiser],
    images_of: Callable,
    indices: np.ndarray,
    config: object,
    processes: Processes,
) -> list[tuple[float, float]]:
    """Each denoiser's mean loss (Eq. 14), and the error of eps that belongs to it, over fixed (image, t, noise).

    Sample j takes image j * len(indices) // samples, so all images count equally often (up to one); the t are evenly
    spaced over 0 .. T-1 in a shuffled order; the noise is j's own. So neither batch size nor chance moves the curve,
    which compares runs; that of eps compares objectives too.

    The denoisers have the same schedule, and are on the device on which `images_of` makes of image indices (B,) their
    uint8 (B, H, W, C). `config` is the run's DiffusionConfig. The processes divide the batches, and all get the means.
    """
    scheduler, samples = denoisers[0].scheduler, config.validation_samples
    order = torch.randperm(samples, generator=generator_of("cpu", config.seed, "validation t"))
    # The middle of each of `samples` strata
    all_t = (2 * order + 1) * scheduler.timesteps // (2 * samples)
    all_images = indices[np.arange(samples) * len(indices) // samples]
    found = []  # on the device, which is not waited for meanwhile
    with ExitStack() as stack:
        for denoiser in denoisers:
            stack.enter_context(denoiser.evaluating())
        for start in range(0, samples, config.batch_size)[processes.rank :: processes.count]:
            places = range(start, min(start + config.batch_size, samples))
            x_0 = to_model_range(images_of(all_images[places.start : places.stop]))
            all_t = all_t.to(x_0.device)  # copies it once, with the first batch
            t = all_t[places.start : places.stop]
            noise = ImageNoise(
                config.seed, places, x_0.shape[1:], x_0.device, "validation noise"
            ).draw()
            for denoiser in denoisers:
                losses = denoising_loss(denoiser, scheduler, x_0, t, noise)
                found.append(
                    torch.stack([losses, eps_errors(denoiser, scheduler, losses, t)]).sum(dim=1)
                )
    total = torch.zeros(2 * len(denoisers), dtype=torch.float64)
    if found:
        total += torch.stack(found).cpu().double().view(-1, 2 * len(denoisers)).sum(dim=0)
    means = (processes.sum_(total) / samples).tolist()
    return list(zip(means[::2], means[1::2], strict=True))
