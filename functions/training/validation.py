"""The training loss on held-out images, measured the same way every time."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from config import DiffusionConfig
from data.batches import batches_of
from data.conditions import with_conditions
from data.pixels import to_model_range
from functions.denoiser import Denoiser
from functions.losses import denoising_loss, eps_errors
from functions.support import processes
from functions.support.random_numbers import generator_of, image_noise
from functions.training.metrics import QUARTERS
from functions.training.run import TrainingRun


def validate(run: TrainingRun) -> dict[str, float]:
    """Validate a run's raw weights, and its EMA weights if there are any: columns of metrics.csv.

    All processes validate together.
    """
    denoisers = {"": run.denoiser}
    if run.ema_model:
        denoisers["_ema"] = run.sample_denoiser
    losses = validation_losses(
        [*denoisers.values()], run.data.gather, run.data.split.val_indices, run.config
    )
    columns = {}
    for suffix, values in zip(denoisers, losses, strict=True):
        # The quarters of the last denoiser stay. It draws samples.
        names = (f"val_loss{suffix}", f"val_eps_error{suffix}", *QUARTERS)
        columns |= zip(names, values, strict=True)
    return columns


@torch.no_grad()
def validation_losses(
    denoisers: list[Denoiser],
    gather: Callable[[np.ndarray], tuple[Tensor, dict[str, Tensor]]],
    indices: np.ndarray,
    config: DiffusionConfig,
) -> list[list[float]]:
    """Return each denoiser's mean loss (Eq. 14), mean error of eps, and mean loss by quarter of t.

    The means are over `config.validation_samples` fixed triples (image, t, noise), whatever the
    batch size, and nan for a quarter without a triple. Losses can be compared between runs with the
    same objective, and errors of eps between all runs.

    The denoisers have the same schedule. `gather` takes image indices (B,) and returns uint8
    (B, H, W, C) on the denoisers' device, and the inputs of the network. The processes share the
    batches, and all get the means.
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
    for positions in batches[processes.rank() :: processes.count()]:
        images, inputs = gather(all_indices[positions])
        x_0 = to_model_range(images)
        inputs = with_conditions(inputs, x_0, vars(config))
        t = all_t[positions].to(x_0.device)
        quarters = 4 * t // timesteps
        # The noise of a triple depends on its position among all triples, not on its batch.
        noise = image_noise(config.seed, positions, x_0.shape[1:], x_0.device, "validation noise")
        eps = noise()

        for i, denoiser in enumerate(denoisers):
            with denoiser.evaluating():
                losses = denoising_loss(denoiser.given(**inputs), x_0, t, eps)
                errors = eps_errors(denoiser, losses, t)
            by_quarter = [losses * (quarters == q) for q in range(4)]
            total[i] += torch.stack([losses, errors, *by_quarter]).sum(dim=1).cpu()

    counts = [count, count, *torch.bincount(4 * all_t // timesteps, minlength=4)]
    return (processes.all_reduce(total) / torch.tensor(counts)).tolist()
