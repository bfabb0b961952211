"""Estimate how long a run takes."""

import time
from datetime import timedelta

import torch

from functions.denoiser import Denoiser
from functions.losses import denoising_loss
from functions.training.run import TrainingRun


def describe_cost(run: TrainingRun) -> str:
    """Describe the time of the remaining steps.

    The optimiser's steps here are real ones, so nothing can be trained afterwards.
    """
    # The first pass and the first step warm up.
    image_count = min(run.config.batch_size, len(run.data.share))
    seconds = min(
        run_pass(run.denoiser, (image_count, *run.experiment.model.image_shape)) for _ in range(2)
    )
    # The gradients are those of the last pass, as in training.
    for _ in range(2):
        start = time.perf_counter()
        run.optimizer.step()
        wait(run.denoiser)
    seconds_of_step = len(run.data.share) * seconds / image_count + time.perf_counter() - start

    to_go = timedelta(seconds=round(seconds_of_step * (run.total_steps - run.step)))
    epochs_of_a_day = 86_400 / (seconds_of_step * run.data.steps_per_epoch)
    return (
        f"  compute    forward and backward of {image_count} on {run.device}: {seconds:.3g} s\n"
        f"             so the steps to go take about {to_go} (h:mm:ss), not compiled\n"
        f"             24 hours are {epochs_of_a_day:,.1f} epochs\n"
        "nothing was started"
    )


def run_pass(denoiser: Denoiser, shape: tuple[int, ...]) -> float:
    """Return the seconds of forward and backward of a step on noise of a shape (B, C, H, W)."""
    device = next(denoiser.network.parameters()).device
    start = time.perf_counter()
    x_0 = torch.randn(shape, device=device)
    t = torch.zeros(len(x_0), dtype=torch.int64, device=device)
    denoising_loss(denoiser, x_0, t, torch.randn_like(x_0)).sum().backward()
    wait(denoiser)
    return time.perf_counter() - start


def wait(denoiser: Denoiser) -> None:
    """Wait until the device has finished; reading a number does so on every device."""
    next(denoiser.network.parameters()).sum().item()
