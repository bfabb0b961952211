"""The losses of a run on held-out images."""

import math
from collections import Counter

import torch

from functions.denoiser import Denoiser
from functions.losses import denoising_loss
from functions.support import processes
from functions.support.processes import batches_of
from functions.training.data import TrainingData
from functions.training.metrics import QUARTERS
from functions.training.run import TrainingRun


def validate(run: TrainingRun) -> dict[str, float]:
    """Validate a run's raw weights, and its EMA weights if there are any: columns of metrics.csv.

    They are val_NAME and val_NAME_ema for each name of `denoising_loss`, and the loss by quarter of
    t. All processes validate together.
    """
    denoisers = {"": run.denoiser}
    if run.ema_model:
        denoisers["_ema"] = run.sample_denoiser
    return validation_losses(denoisers, run.data)


@torch.no_grad()
def validation_losses(denoisers: dict[str, Denoiser], data: TrainingData) -> dict[str, float]:
    """Return the mean losses of denoisers, by suffix, over the triples of `data.held_out`.

    The quarters of t are those of the last denoiser, which draws samples; one without a triple is
    nan. The processes share the batches, and all get the means.
    """
    sums, counts = Counter(), Counter()
    batches = batches_of(range(data.config.validation_samples), data.config.batch_size)
    for places in batches[processes.rank() :: processes.count()]:
        x_0, t, eps, inputs = data.held_out(places)
        quarters = 4 * t // data.config.timesteps_diff
        values = {}
        for suffix, denoiser in denoisers.items():
            with denoiser.evaluating():
                losses = denoising_loss(denoiser.given(**inputs), x_0, t, eps)
            values |= {f"val_{name}{suffix}": each for name, each in losses.items()}
        values |= {name: losses["loss"][quarters == q] for q, name in enumerate(QUARTERS)}
        sums.update({name: each.double().sum().item() for name, each in values.items()})
        counts.update({name: len(each) for name, each in values.items()})
    all_sums, all_counts = Counter(), Counter()
    for their_sums, their_counts in processes.gathered((sums, counts)):
        all_sums.update(their_sums)
        all_counts.update(their_counts)
    return {name: all_sums[name] / (count or math.nan) for name, count in all_counts.items()}
