"""Estimate how long a run takes."""

import time
from datetime import timedelta

from torch import Tensor

from data.pixels import to_model_range
from functions.denoiser import Denoiser
from functions.losses import denoising_loss
from functions.training.run import TrainingRun


def describe_cost(run: TrainingRun) -> str:
    """Describe the time of the remaining steps.

    The optimiser's steps here are real ones, so nothing can be trained afterwards.
    """
    # The first pass and the first step warm up.
    step = run.step
    draws = run.data.draw(step)
    images, inputs = next(run.data.batches(range(step, step + 1)))
    x_0, inputs = run.data.augment(to_model_range(images), inputs, draws, 0.0)
    image_count = min(run.config.batch_size, len(run.data.share))
    batch = [each[:image_count] for each in (x_0, draws.t, draws.noise)]
    denoiser = run.denoiser.given(**{name: value[:image_count] for name, value in inputs.items()})
    seconds = min(run_pass(denoiser, *batch) for _ in range(2))
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


def run_pass(denoiser: Denoiser, x_0: Tensor, t: Tensor, noise: Tensor) -> float:
    """Return the seconds of forward and backward of `denoising_loss`."""
    start = time.perf_counter()
    denoising_loss(denoiser, x_0, t, noise).sum().backward()
    wait(denoiser)
    return time.perf_counter() - start


def wait(denoiser: Denoiser) -> None:
    """Wait until the device has finished; reading a number does so on every device."""
    next(denoiser.network.parameters()).sum().item()
