"""Ours by itself: what a training and a sampling do beside the network, each as seconds and as a share."""

import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.compare_arms import Shape
from benchmarks.compare_measures import seconds_of
from benchmarks.data_feeding import index_batches, make_photos, rate_of
from data.batches import ImageFeeder
from data.datasets import load_images
from functions.ema import update_ema
from functions.noise_scheduler import NoiseScheduler
from functions.prediction import Denoiser
from functions.samplers import ddim_sample, ddpm_sample
from functions.support.checkpoint import TrainingState, save_checkpoint
from functions.support.random_numbers import ImageNoise

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = 200
SAMPLER_STEPS = 10
LOOP_STEPS = 10  # timed ones, of the training loop


@dataclass
class Alone:
    """The parts of ours to measure, with the network and optimiser of the arm `ours`."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    shape: Shape
    device: torch.device
    dtype: torch.dtype
    rounds: int

    def measure(self) -> list[dict]:
        """Rows of {what, value, unit, text}; values are medians over rounds, None for what failed."""
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            photos = folder / "photos.zip"
            make_photos(photos, PHOTOS)
            parts = {
                ("data feeding", "images/s"): lambda: self.data_feeding(photos),
                ("EMA, one update", "s"): self.ema,
                ("checkpoint stall", "s"): lambda: self.checkpoint(folder),
                ("data, host work and logging in train.py", "%"): lambda: self.training_loop(photos, folder / "runs"),
                ("ddpm_sample beside the network", "%"): lambda: self.sampler(ddpm_sample),
                ("ddim_sample beside the network", "%"): lambda: self.sampler(ddim_sample),
            }
            return [{"what": what, "unit": unit, **attempted(part)} for (what, unit), part in parts.items()]

    def data_feeding(self, photos: Path) -> dict:
        """Images a second that reach the device from the packed file."""
        images = load_images(str(photos), self.shape.image_size, quiet=True).images
        feeder = ImageFeeder(images, self.device)
        batch = self.shape.batch_size
        feed = lambda: rate_of(feeder.feed(index_batches(len(images), batch, 500 * batch)), self.device)
        rate = statistics.median(feed() for _ in range(self.rounds))
        return result(rate, f"{batch / rate:.2g} s a batch of {batch}, shuffled, onto {self.device}")

    def sampler(self, sample: Callable) -> dict:
        """The share of a sampling loop that is not in the network's calls."""
        scheduler = NoiseScheduler(1000, 1e-4, 0.02, True)
        predict = Denoiser(self.model.eval(), scheduler, precision=self.dtype)
        shares = []
        for _ in range(self.rounds):
            inside = []
            noise = ImageNoise(0, range(self.shape.batch_size), (3, *2 * [self.shape.image_size]), self.device)
            model = timing(predict, inside, self.device)
            loop = lambda model=model, noise=noise: sample(
                model, scheduler, noise.draw(), SAMPLER_STEPS, step_noise=lambda k: noise.draw()
            )
            total = seconds_of(loop, self.device)
            shares.append(100 * (total - sum(inside)) / total)
        self.model.train()
        text = f"of the time of {SAMPLER_STEPS} steps, {min(shares):.2f} to {max(shares):.2f}"
        return result(statistics.median(shares), text)

    def ema(self) -> dict:
        """Seconds of the average; the optimiser's are in the arm's readings."""
        ema = copy.deepcopy(self.model)
        update = partial(update_ema, ema, self.model, 10, 0.9999)
        update()
        seconds = [seconds_of(update, self.device) for _ in range(self.rounds)]
        return result(statistics.median(seconds), "of all weights, after every step")

    def checkpoint(self, folder: Path) -> dict:
        """How long training stands still for a checkpoint."""
        path, scaler = folder / "checkpoint.safetensors", torch.amp.GradScaler("cpu", enabled=False)
        state = TrainingState(self.model, copy.deepcopy(self.model), self.optimizer, scaler)
        save = partial(save_checkpoint, path, {}, {}, state)
        seconds = statistics.median(seconds_of(save, self.device) for _ in range(min(self.rounds, 3)))
        size = path.stat().st_size
        text = f"{size / 1e6:,.0f} MB to {tempfile.gettempdir()}, {size / 1e6 / seconds:,.0f} MB/s"
        return result(seconds, text)

    def training_loop(self, photos: Path, runs: Path) -> dict:
        """The share of train.py's loop that is not in forward, backward, augmentation, clipping, Adam or EMA."""
        shape, dtype = self.shape, str(self.dtype).removeprefix("torch.")
        settings = {
            "diffusion.dataset-name": photos, "diffusion.batch-size": shape.batch_size,
            "diffusion.gradient-accumulation": 1, "diffusion.precision": dtype, "diffusion.epochs": 1000,
            "model.image-size": shape.image_size, "model.lowest-resolution-size": shape.lowest_resolution_size,
            "model.dim-multiply": ",".join(map(str, shape.dim_multiply)),
            "model.transformer-layers": ",".join(map(str, shape.attention_levels)),
            "model.base-dim": shape.base_dim, "model.norm-groups": shape.norm_groups,
            "device": self.device, "runs": runs,
        }  # fmt: skip
        flags = [f"--{name}={value}" for name, value in settings.items()]
        command = [sys.executable, "-m", "benchmarks.compare_loop", str(LOOP_STEPS), "ffhq-run2", *flags]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"train.py: {done.stderr.strip().splitlines()[-1]}")
        shares = json.loads(done.stdout.splitlines()[-1])
        text = f"of a step of {shape.batch_size} images, {min(shares):.2f} to {max(shares):.2f}; a row of metrics in 5"
        return result(statistics.median(shares), text)


def result(value: float | None, text: str) -> dict:
    return {"value": value, "text": text}


def attempted(part: Callable[[], dict]) -> dict:
    """What a part measured, or that it failed: the others are measured all the same."""
    try:
        return part()
    except Exception as error:
        return result(None, f"failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")


def timing(function: Callable, seconds: list[float], device: torch.device) -> Callable[..., Tensor]:
    """The function, which from now on adds the seconds of each call to a list.

    On CUDA it waits for the device before and after, so work on the host that otherwise overlaps does not: what is
    measured outside of it is an upper bound.
    """

    def timed(*args, **kwargs):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)

    return timed
