"""The training loss on held-out images, measured the same way every time."""

import torch

from functions.denoiser import Denoiser
from functions.losses import denoising_loss, eps_errors
from functions.support import processes
from functions.support.processes import batches_of
from functions.training.data import TrainingData
from functions.training.metrics import QUARTERS
from functions.training.run import TrainingRun


def validate(run: TrainingRun) -> dict[str, float]:
    """Validate a run's raw weights, and its EMA weights if there are any: columns of metrics.csv.

    All processes validate together.
    """
    denoisers = {"": run.denoiser}
    if run.ema_model:
        denoisers["_ema"] = run.sample_denoiser
    losses = validation_losses([*denoisers.values()], run.data)
    columns = {}
    for suffix, values in zip(denoisers, losses, strict=True):
        # The quarters of the last denoiser stay. It draws samples.
        names = (f"val_loss{suffix}", f"val_eps_error{suffix}", *QUARTERS)
        columns |= zip(names, values, strict=True)
    return columns


@torch.no_grad()
def validation_losses(denoisers: list[Denoiser], data: TrainingData) -> list[list[float]]:
    """Return each denoiser's mean loss (Eq. 14), mean error of eps, and mean loss by quarter of t.

    The means are over the triples of `data.held_out`, whatever the batch size, and nan for a
    quarter without a triple. Losses can be compared between runs with the same objective, and
    errors of eps between all runs. The processes share the batches, and all get the means.
    """
    # Sums of loss, error, losses by quarter of t; and of ones, once and by quarter
    total = torch.zeros(len(denoisers), 11, dtype=torch.float64)
    batches = batches_of(range(data.config.validation_samples), data.config.batch_size)
    for places in batches[processes.rank() :: processes.count()]:
        x_0, t, eps, inputs = data.held_out(places)
        quarters = 4 * t // data.config.timesteps_diff
        masks = [quarters == q for q in range(4)]
        for i, denoiser in enumerate(denoisers):
            with denoiser.evaluating():
                losses = denoising_loss(denoiser.given(**inputs), x_0, t, eps)
                errors = eps_errors(denoiser, losses, t)
            sums = [losses, errors, *(losses * mask for mask in masks)]
            sums += [torch.ones_like(losses), *masks]
            total[i] += torch.stack(sums).sum(dim=1).cpu()
    total = processes.all_reduce(total)
    sums, ones = total[:, :6], total[:, [6, 6, 7, 8, 9, 10]]
    return (sums / ones).tolist()
