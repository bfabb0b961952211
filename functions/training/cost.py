"""Estimate how long a run takes, and say what slows it down."""

import time
from datetime import timedelta
from pathlib import Path

import torch
from tqdm import tqdm

from functions.denoiser import Denoiser
from functions.losses import denoising_loss
from functions.support.device import seconds_without_core
from functions.support.errors import quoted
from functions.training.run import TrainingRun

# Other programs slow a training down if its threads wait for cores for longer than this fraction
# of the time in which they have one.
BUSY = 0.1


def describe_cost(run: TrainingRun) -> str:
    """Describe the time of the remaining steps.

    The optimiser's steps here are real ones, so nothing can be trained afterwards.
    """
    # The first pass and the first step warm up.
    image_count = min(run.config.batch_size, len(run.share))
    seconds = min(
        run_pass(run.denoiser, (image_count, *run.experiment.model.image_shape)) for _ in range(2)
    )
    # The gradients are those of the last pass, as in training.
    for _ in range(2):
        start = time.perf_counter()
        run.optimizer.step()
        wait(run.denoiser)
    seconds_of_step = len(run.share) * seconds / image_count + time.perf_counter() - start

    to_go = timedelta(seconds=round(seconds_of_step * (run.total_steps - run.step)))
    epochs_of_a_day = 86_400 / (seconds_of_step * run.steps_per_epoch)
    return (
        f"  compute    forward and backward of {image_count} on {run.device}: {seconds:.3g} s\n"
        f"             so the steps to go take about {to_go} (h:mm:ss), not compiled\n"
        f"             24 hours are {epochs_of_a_day:,.1f} epochs\n"
        "nothing was started"
    )


def warn_if_busy(folder: Path) -> None:
    """Print what to do if the threads of this process have often waited for a core; Linux only."""
    threads = torch.get_num_threads()
    waited = seconds_without_core()
    # A single thread just takes longer. Several have to wait for one whose core is busy, again and
    # again in each step. Their number is the user's, because the bits depend on it.
    if threads > 1 and waited > BUSY * time.process_time():
        tqdm.write(
            f"warning: other programs keep the cores busy: PyTorch's {threads} threads have waited "
            f"{waited:.0f} seconds for them. Fewer threads are often several times faster: press "
            f"Ctrl-C, and continue with OMP_NUM_THREADS={threads // 2} "
            f"python train.py --resume {quoted(folder)}"
        )


def run_pass(denoiser: Denoiser, shape: tuple[int, ...]) -> float:
    """Return the seconds of forward and backward of a step on noise of a shape (B, C, H, W)."""
    device = next(denoiser.network.parameters()).device
    start = time.perf_counter()
    x_0 = torch.randn(shape, device=device)
    t = torch.zeros(len(x_0), dtype=torch.int64, device=device)
    losses = denoising_loss(denoiser, x_0, t, torch.randn_like(x_0))
    losses.sum().backward()
    wait(denoiser)
    return time.perf_counter() - start


def wait(denoiser: Denoiser) -> None:
    """Wait until the device has finished; reading a number does so on every device."""
    next(denoiser.network.parameters()).sum().item()
