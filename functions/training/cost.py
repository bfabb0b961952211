"""Estimate what a run costs: before it starts, and by its first steps."""

import math
import time

import torch
from torch import Tensor
from tqdm import tqdm

from config import MOST_EPOCHS
from functions.denoiser import Denoiser
from functions.losses import denoising_loss
from functions.support.device import seconds_without_core
from functions.support.files import quoted, short
from functions.training.run import TrainingRun

SECONDS_OF_A_DAY = 24 * 3600
# A training estimates its time after so many steps, or after so many seconds.
FIRST_STEPS = 20
FIRST_SECONDS = 60
# Other programs slow a training down if its threads wait for cores for a larger part of the time.
# This was 0.01 on idle cores, and at least 0.2 beside another busy process.
BUSY = 0.1


def describe_cost(run: TrainingRun) -> str:
    """Describe the time of the remaining steps, and the images and snapshots of the whole run.

    The optimiser's steps here are real ones, so nothing can be trained afterwards.
    """
    denoiser = run.denoiser
    optimizer = run.optimizer
    image_shape = run.experiment.model.image_shape
    # The first pass and the first step warm up.
    image_count = min(run.config.batch_size, len(run.share))
    seconds = min(run_pass(denoiser, (image_count, *image_shape)) for _ in range(2))
    # The gradients are those of the last pass, as in training.
    optimizer.step()
    wait(denoiser)
    start = time.perf_counter()
    optimizer.step()
    wait(denoiser)
    seconds_of_step = len(run.share) * seconds / image_count + time.perf_counter() - start

    steps = run.total_steps - run.step
    epochs_of_a_day = SECONDS_OF_A_DAY / (seconds_of_step * run.steps_per_epoch)
    # Rounded down, so that it does not contradict the whole number after it.
    epochs_of_a_day = math.floor(10 * epochs_of_a_day) / 10
    images_seen = run.total_steps * run.config.effective_batch
    times_seen = images_seen / len(run.split.train_indices)
    folder = run.folder or run.runs_folder / f"{run.name}-<time>"
    return (
        f"  compute    forward and backward of {image_count} on {run.device}: {seconds:.3g} s\n"
        f"             so the {steps:,} steps to go take about "
        f"{duration(seconds_of_step * steps)}, not compiled\n"
        f"             24 hours are {epochs_of_a_day:,.1f} epochs: "
        f"--diffusion.epochs {min(max(1, int(epochs_of_a_day)), MOST_EPOCHS)}\n"
        f"  sees       {images_seen:,} images, each training image {times_seen:,.0f} times\n"
        f"  snapshots  {describe_snapshots(run)}\n"
        f"  images in  {short(run.image_set.path)}\n"
        f"  goes to    {folder}\n"
        "nothing was started"
    )


class FirstSteps:
    """The first steps of a process, without the very first, and how long the others will take."""

    def __init__(self):
        self.steps = 0
        self.counting = True

    def count(self, run: TrainingRun, grad_norm: Tensor) -> None:
        """Count a step with this gradient norm. After the last one that counts, print the time."""
        if not self.counting or run.step == run.total_steps:
            return
        self.steps += 1
        if self.steps == 1:
            self.began = time.monotonic()
            self.without_core = seconds_without_core()
        elif self.steps == FIRST_STEPS or time.monotonic() - self.began > FIRST_SECONDS:
            self.counting = False
            # Reading a number of the last step waits for the device.
            grad_norm.item()
            if run.processes.is_main:
                self.print_estimate(run, time.monotonic() - self.began)

    def print_estimate(self, run: TrainingRun, seconds: float) -> None:
        """Print how long the steps to go take, and what to do if the cores are busy."""
        steps = run.total_steps - run.step
        seconds_to_go = seconds / (self.steps - 1) * steps
        # tqdm prints it above the bar.
        tqdm.write(
            f"the {steps:,} steps to go take about {duration(seconds_to_go)}, and "
            "validations and samples a little more"
        )
        threads = torch.get_num_threads()
        waiting = (seconds_without_core() - self.without_core) / (seconds * threads)
        # A single thread just takes longer. Several have to wait for one whose core is busy, again
        # and again in each step. The number is the user's, because the bits depend on it.
        if run.device.type == "cpu" and threads > 1 and waiting > BUSY:
            tqdm.write(
                f"warning: other programs keep the cores busy: PyTorch's {threads} threads waited "
                f"for them {waiting:.0%} of the time. Fewer threads are often several times "
                f"faster: press Ctrl-C, and continue with OMP_NUM_THREADS={threads // 2} "
                f"python train.py --resume {quoted(run.folder)}"
            )


def describe_snapshots(run: TrainingRun) -> str:
    """Return the number and the size of a whole run's snapshots, which have weights in float16."""
    every = run.config.snapshot_every
    # The last step has one, too.
    count = math.ceil(run.total_steps / every) if every else 0
    gigabytes = 2 * run.provenance["parameters"] / 1e9
    return f"{count} of {gigabytes:.2g} GB, {count * gigabytes:.2g} GB in all"


def duration(seconds: float) -> str:
    """Return a time such as "12 seconds", "5.4 minutes" or "23.1 hours"."""
    if seconds < 60:
        return f"{seconds:.2g} seconds"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:,.1f} hours"


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
