"""What figures/experiments.py measures: of an arm's samples, and of samplers on one model.

All arms are sampled alike: `ddpm_sample` with CALLS network calls spread evenly over their T, from the same x_T and
with the same step noise, so that what differs is the weights and the schedule. It is fewer calls than T, for time. The
network runs in the precision that it was trained in.

Feature distance and colours are those of figures/experiment_features.py.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from config import EXPERIMENTS
from data.pixels import to_uint8
from figures.experiment_arms import AVERAGES, Results, finished_run, own_average, weights_file
from figures.experiment_features import colours, data_numbers, data_of
from functions.evaluation.bits_per_dim import BoundOptions, evenly, measure_bits_per_dim
from functions.prediction import Denoiser
from functions.samplers import ddpm_sample
from functions.sampling.generation import rebuild
from functions.support.checkpoint import load_weights
from functions.support.device import choose_device, choose_precision
from functions.support.processes import SINGLE_PROCESS
from functions.support.random_numbers import ImageNoise, generator_of
from functions.training.validation import validation_loss
from models.unet import UNet

CALLS = 40
BATCH = 40
BITS_STRIDE, BITS_IMAGES = 20, 45  # bits/dim: of a t in 20 or more, and every second held-out image
STARTED = ", started from noised images"
EVERY_AVERAGE = ("T1000", "T1000-constant")  # arms whose samples are measured with every average; others: raw and own


def in_batches(
    draw: Callable[[Tensor, ImageNoise], Tensor], images: range, shape: tuple, device: torch.device
) -> Tensor:
    """Samples number `images`, by a function of x_T and of where more noise comes from; always the same noise."""
    parts = []
    for start in range(0, len(images), BATCH):
        noise = ImageNoise(0, images[start : start + BATCH], shape, device)
        parts.append(draw(noise.draw(), noise))
    return torch.cat(parts)


def arm_samples(
    denoiser: Denoiser,
    count: int,
    shape: tuple,
    device: torch.device,
    start: Tensor | None,
) -> Tensor:
    """`count` samples, as this module's docstring says; `start`: images that, noised, replace pure noise as x_T."""
    scheduler = denoiser.scheduler
    first = iter(start.split(BATCH) if start is not None else [])

    def draw(x_T: Tensor, noise: ImageNoise) -> Tensor:
        if start is not None:
            x_T = scheduler.q_sample(next(first), scheduler.timesteps - 1, x_T)
        calls = min(CALLS, scheduler.timesteps)
        return ddpm_sample(denoiser, scheduler, x_T, calls, step_noise=lambda k: noise.draw())

    return in_batches(draw, range(count), shape, device)


def measure(args: argparse.Namespace) -> None:
    """Every finished run, as far as the results have no numbers of it yet."""
    device, results = choose_device(args.device), Results(args.results)
    for seed in args.seeds:
        for arm in args.arms:
            run = finished_run(args.runs, arm, seed)
            if run is None:
                print(f"{arm}, seed {seed}: not trained yet")
                continue
            own = own_average(load_weights(weights_file(run, "raw")).config)
            others = sorted(name for name in AVERAGES if weights_file(run, name).exists() and name != own)
            for name in ("raw", own, *others):
                measure_weights(run, arm, name, name in ("raw", own), results, ("arms", arm, str(seed)), args, device)
            if arm == "T200-as-is":  # is it the start that is at fault?
                measure_weights(run, arm, own + STARTED, True, results, ("arms", arm, str(seed)), args, device)


def measure_weights(
    run: Path,
    arm: str,
    key: str,
    main: bool,
    results: Results,
    place: tuple,
    args: argparse.Namespace,
    device: torch.device,
) -> None:
    """One of a run's weights into the results, under `place` and `key`; what has been measured before stays.

    `main`: weights of which everything is measured, in all arms.
    """
    missing = {"validation_loss", *(["distance"] if main or arm in EVERY_AVERAGE else []), *(["bits"] if main else [])}
    if STARTED in key:
        missing = {"distance"}  # all else is that of the same weights
    missing -= (results.get(*place, key) or {}).keys()
    if not missing:
        return
    saved = load_weights(weights_file(run, key.removesuffix(STARTED)))
    precision, data = choose_precision("auto", device), data_of(saved.config, device)
    denoiser = rebuild(UNet, saved, device, precision)
    every = np.arange(len(data.held_out))
    held_out = lambda indices: data.held_out[indices]
    if results.get("data", "arms") is None:
        results.put(data_numbers(data, args.samples), "data", "arms")

    if "validation_loss" in missing:
        config = replace(EXPERIMENTS["faces"].diffusion, validation_samples=4 * len(every), batch_size=BATCH, seed=0)
        images_of = lambda indices: to_uint8(held_out(indices))
        loss, _ = validation_loss(denoiser, images_of, every, config, SINGLE_PROCESS)
        results.put(loss, *place, key, "validation_loss")
    if "bits" in missing:
        bits = measure_bits_per_dim(denoiser, held_out, evenly(every, BITS_IMAGES), BoundOptions(BITS_STRIDE))
        facts = {"total": bits.total, "se": bits.standard_error, "distortion": bits.distortion,
                 "prior": float(bits.prior.mean()), "images": len(bits.prior)}  # fmt: skip
        results.put(facts, *place, key, "bits")
    if "distance" in missing:
        order = torch.randperm(len(data.train), generator=generator_of("cpu", "start"))[: args.samples]
        start = data.train[order] if STARTED in key else None
        count = args.samples if start is None else len(start)
        images = arm_samples(denoiser, count, data.train.shape[1:], device, start)
        results.put(count, *place, key, "samples")
        results.put(colours(images, data.train), *place, key, "colours")
        results.put(data.distance(images), *place, key, "distance")
        np.save(picture_file(run, key), to_uint8(images[:16]).numpy())
    print(f"{run.name}, {key}: {results.get(*place, key)}", flush=True)


def picture_file(run: Path, key: str) -> Path:
    """Where the first samples are kept for the picture."""
    return weights_file(run, key).with_suffix(".samples.npy")
