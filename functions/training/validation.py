"""The training loss on held-out images, measured the same way every time."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from functions.losses import noise_prediction_loss
from functions.noise_scheduler import NoiseScheduler
from functions.prediction import autocast
from functions.support.processes import SINGLE_PROCESS, Processes
from functions.support.random_numbers import generator_of


@torch.no_grad()
def validation_loss(
    model: nn.Module,
    scheduler: NoiseScheduler,
    x_0_of: Callable[[np.ndarray], Tensor],
    indices: np.ndarray,
    samples: int,
    batch_size: int,
    seed: int,
    precision: torch.dtype,
    processes: Processes = SINGLE_PROCESS,
) -> float:
    """Mean loss (Eq. 14) over fixed triples (image, t, noise): smooth over a run, and comparable between runs.

    Sample j takes image j * len(indices) // samples, so all images count equally often (up to one); the t are evenly
    spaced over 0 .. T-1 in a shuffled order; the noise is j's own. So neither batch size nor chance moves the curve.

    Args:
        x_0_of: image indices (B,) -> (B, C, H, W) float32 in [-1, 1], on the model's device.
        indices: the held-out images.
        samples: how many triples.
        processes: those that share the work; each takes some of the batches, and all get the mean.
    """
    order = torch.randperm(samples, generator=generator_of("cpu", seed, "validation t"))
    all_t = (2 * order + 1) * scheduler.timesteps // (2 * samples)  # the middle of each of `samples` strata
    all_images = indices[np.arange(samples) * len(indices) // samples]
    training, total = model.training, 0.0
    model.eval()
    for start in range(0, samples, batch_size)[processes.rank :: processes.count]:
        x_0 = x_0_of(all_images[start : start + batch_size])
        t = all_t[start : start + batch_size].to(x_0.device)
        noise = torch.stack([
            torch.randn(x_0.shape[1:], generator=generator_of("cpu", seed, "validation noise", start + j))
            for j in range(len(x_0))
        ]).to(x_0.device)  # fmt: skip
        with autocast(x_0.device, precision):
            total += noise_prediction_loss(model, scheduler, x_0, t, noise).sum().item()
    model.train(training)
    return processes.sum_(torch.tensor(total, dtype=torch.float64)).item() / samples
