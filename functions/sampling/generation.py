"""Sample images with a trained model, for the scripts and for training's grids.

The images stay in memory. The samplers of functions/samplers.py are called for as many images at a
time as memory has room for.
"""

import argparse
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from config import LARGEST
from data.pixels import to_uint8
from functions.noise_scheduler import NoiseScheduler
from functions.prediction import Denoiser
from functions.samplers import SAMPLERS, VARIANCES, OnStep
from functions.sampling.cuda_graph import CudaGraphed
from functions.sampling.options import SamplerOptions
from functions.support.checkpoint import SavedModel, load_into
from functions.support.device import (
    choose_device,
    choose_precision,
    cpu_batch_limit,
    is_out_of_memory,
)
from functions.support.diffusers_folder import load_model
from functions.support.errors import CheckpointError, UserError
from functions.support.files import READ_ERRORS, short
from functions.support.processes import Processes
from functions.support.random_numbers import ImageNoise
from functions.support.run_folder import find_checkpoints, first_intact, newest_checkpoints
from models.unet import UNet

Result = TypeVar("Result")
# ("x", k) is the state after k network calls, and ("x", 0) the noise. ("x_0", k) is the x_0 that
# the k-th call predicts.
Frame = tuple[str, int]


@dataclass
class Samples:
    """Hold images, and the frames of their denoising that the caller asked for."""

    # (N, C, H, W) in [-1, 1], on the CPU
    images: Tensor
    # uint8 (N, H, W, C) each
    frames: dict[Frame, np.ndarray]

    @staticmethod
    def concatenated(batches: Sequence["Samples"]) -> "Samples":
        """Put the samples of several batches together, in their order."""
        images = torch.cat([batch.images for batch in batches])
        frames = {}
        for frame in batches[0].frames:
            frames[frame] = np.concatenate([batch.frames[frame] for batch in batches])
        return Samples(images, frames)


@dataclass(frozen=True)
class ImageSampler:
    """Hold all that decides the pixels of image i.

    Raises UserError when the options ask for more steps than the model has timesteps.
    """

    denoiser: Denoiser
    options: SamplerOptions
    shape: tuple[int, int, int]  # (C, H, W)
    seed: int
    device: torch.device
    # At most this many images are sampled at a time. This field and the next two change pixels by
    # rounding alone.
    batch_size: int = 64
    # The sampler calls this after every step.
    on_step: OnStep | None = None
    # On CUDA the network is recorded as a CUDA graph, which is replayed for each call.
    use_cuda_graph: bool = True

    def __post_init__(self) -> None:
        self.options.times(self.scheduler)

    @property
    def scheduler(self) -> NoiseScheduler:
        return self.denoiser.scheduler

    @property
    def times(self) -> list[int]:
        """Return the falling timesteps between the steps from noise to image; the last is -1."""
        return self.options.times(self.scheduler)

    @property
    def network_calls(self) -> int:
        """Return how many network calls an image takes. All samplers make one call a step."""
        return len(self.times) - 1

    def quick(self, seed: int) -> "ImageSampler":
        """Return this sampler with another seed and 20 steps of dpm++.

        dpm++ adds fresh noise, which keeps samples realistic in 20 steps.
        """
        steps = min(20, self.scheduler.timesteps)
        options = SamplerOptions("dpm++", steps, clip_x_0=self.options.clip_x_0)
        return replace(self, options=options, seed=seed)

    def noise(self, indices: Sequence[int], purpose: str = "image") -> ImageNoise:
        """Return the noise of the images with these indices: that is x_T, then each step's noise.

        Each purpose has different noise.
        """
        return ImageNoise(self.seed, indices, self.shape, self.device, purpose)

    def denoise(self, x_t: Tensor, t: int, noise: Callable[[], Tensor]) -> Tensor:
        """Denoise states (B, C, H, W) at timestep t to images, by the sampler's steps below t.

        At t = -1 the states are images already.
        """
        if t < 0:
            return x_t
        return self.take_steps(x_t, self.options.times(self.scheduler, t), noise)

    def take_steps(self, x: Tensor, times: list[int], noise: Callable[[], Tensor]) -> Tensor:
        """Take states (B, C, H, W) from the first of falling timesteps to the last.

        `noise()` draws standard normal noise (B, C, H, W). It is called for each step that adds
        noise.
        """
        return SAMPLERS[self.options.sampler].function(
            self.denoiser,
            self.scheduler,
            x,
            times,
            **self.options.arguments,
            clip_x_0=self.options.clip_x_0,
            step_noise=lambda k: noise(),
            on_step=self.on_step,
        )

    def sample(self, indices: Sequence[int], frames: Collection[Frame], bar: tqdm) -> Samples:
        """Sample the images with these indices as one batch; the bar counts each image's steps."""
        noise = self.noise(indices)
        arrays = {}

        def keep(frame, x):
            if frame in frames:
                arrays[frame] = to_uint8(x).cpu().numpy()

        def on_step(k, t, x, x_0):
            keep(("x", k + 1), x)
            keep(("x_0", k + 1), x_0)
            bar.update(len(indices))
            if self.on_step:
                self.on_step(k, t, x, x_0)

        x_T = noise.draw()
        keep(("x", 0), x_T)
        sampler = replace(self, on_step=on_step)
        x_0 = sampler.denoise(x_T, self.scheduler.timesteps - 1, noise.draw)
        return Samples(x_0.cpu(), arrays)


def open_sampler(
    args: argparse.Namespace, processes: Processes, experiments: str = ""
) -> tuple[SavedModel, ImageSampler]:
    """Load the checkpoint that the flags of `add_sampling_flags` name, and return its sampler, too.

    The checkpoint is the newest intact one of the run. If the flags name no run, it is that of the
    newest run whose name begins with `experiments`. The sampler has no calibration yet. Raises
    UserError for flags that the machine or the model cannot satisfy.
    """
    # Each of several processes has its own GPU.
    index = processes.local_rank if processes.count > 1 else None
    device = choose_device(args.device, index)
    precision = choose_precision(args.precision, device)
    # Options that fit no model are refused here, before a checkpoint is read.
    SamplerOptions.from_args(args, {})

    def find():
        if args.checkpoint:
            return find_checkpoints(args.checkpoint)
        return newest_checkpoints(args.runs, experiments)

    saved = load_intact(find, processes)
    processes.print_main(f"{saved.path}: {saved}")
    denoiser = rebuild(saved, device, precision)
    options = SamplerOptions.from_args(args, saved.config["diffusion"])

    shape = saved.model.image_shape
    if device.type == "cpu":
        # A GPU raises an error when memory is short, and `BatchLimit` then halves the batch. A CPU
        # does not, so the network's batch is limited beforehand: `Denoiser` splits larger ones.
        x_t = torch.zeros(1, *shape)
        limit = cpu_batch_limit(partial(denoiser, x_t, torch.zeros(1, dtype=torch.int64)))
        # The processes share the memory.
        denoiser = replace(denoiser, largest_batch=max(limit // processes.count, 1))
    return saved, ImageSampler(denoiser, options, shape, args.seed, device, args.batch_size)


def load_intact(find: Callable[[], list[Path]], processes: Processes) -> SavedModel:
    """Load the first intact one of the checkpoints that `find` returns, in all processes."""
    # Rank 0 reads checkpoints until one is intact. Thanks to the cache it reads none of them twice.
    read = cache(load_model)
    return read(processes.on_main(lambda: first_intact(find(), read).path))


def rebuild(
    saved: SavedModel, device: torch.device, precision: torch.dtype = torch.float32
) -> Denoiser:
    """Rebuild network and schedule from a checkpoint alone, for use without gradients.

    Raises CheckpointError when its config describes no model, or its weights do not fit the config.
    """
    try:
        diffusion = saved.config["diffusion"]
        timesteps = diffusion["timesteps_diff"]
        # The tables of more timesteps would take all memory.
        if timesteps > LARGEST["timesteps_diff"]:
            raise ValueError(f"timesteps_diff is above {LARGEST['timesteps_diff']:,}")
        scheduler = NoiseScheduler(
            timesteps,
            diffusion["beta_start"],
            diffusion["beta_end"],
            diffusion["rescale_betas"],
            # Older checkpoints do not have this field.
            diffusion.get("beta_schedule", "linear"),
        )
        # On the meta device the network has shapes alone. So no time is spent on initial weights,
        # which would be overwritten at once.
        with torch.device("meta"):
            model = UNet(**vars(saved.model))
        denoiser = Denoiser(model, scheduler, precision, diffusion.get("objective", "eps"))
        variance = diffusion.get("variance", "small")
        if variance not in VARIANCES:
            raise ValueError(f"variance is {variance!r}; it can be small or large")
    except (*READ_ERRORS, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {short(error)}"
        raise CheckpointError(
            f"{saved.path}: its config describes no model of this version: {reason}"
        ) from error

    load_into(model, saved)
    # Without gradients channels_last is faster on CPUs, too. On 2 cores a face took 3.5 ms in
    # float32, and 4.7 ms in the default layout.
    model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    return denoiser


def generate(
    image_sampler: ImageSampler, indices: Sequence[int], frames: Collection[Frame] = ()
) -> Samples:
    """Sample images by their indices i, in batches of the sampler's size.

    The noise of image i depends on (seed, i) alone, so other batches change its pixels by rounding
    alone.
    """
    batches = batches_of(indices, image_sampler.batch_size)
    with image_sampler.denoiser.evaluating():
        return Samples.concatenated(list(generate_batches(image_sampler, batches, frames)))


def batches_of(indices: Sequence[int], batch_size: int) -> list[Sequence[int]]:
    """Split the indices into batches; the last may be smaller."""
    return [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]


def generate_batches(
    image_sampler: ImageSampler,
    batches: list[Sequence[int]],
    frames: Collection[Frame] = (),
    progress: bool = False,
) -> Iterator[Samples]:
    """Yield the `Samples` of each batch of indices, which is sampled when the caller asks for it.

    `BatchLimit` halves a batch that does not fit in memory.
    """
    denoiser = image_sampler.denoiser
    if image_sampler.device.type == "cuda" and image_sampler.use_cuda_graph:
        denoiser = replace(denoiser, network=CudaGraphed(denoiser.network))
        image_sampler = replace(image_sampler, denoiser=denoiser)
    limit = BatchLimit(image_sampler.device)
    total = image_sampler.network_calls * sum(map(len, batches))
    with tqdm(
        desc="sampling", total=total, unit="step", unit_scale=True, disable=not progress
    ) as bar:
        sample = partial(image_sampler.sample, frames=frames, bar=bar)
        for batch in batches:
            yield Samples.concatenated(limit.in_parts(sample, batch))


@dataclass
class BatchLimit:
    """Limit how many images are computed at a time to `size`.

    When memory runs out, `size` becomes half of the part that did not fit, also for later work.
    """

    device: torch.device
    size: int = sys.maxsize

    def in_parts(
        self, work: Callable[[Sequence[int]], Result], indices: Sequence[int]
    ) -> list[Result]:
        """Call `work` for one part of the indices after the other, and return its results.

        A part has at most `size` indices. Raises UserError when a single image does not fit in
        memory.
        """
        results = []
        done = 0
        while done < len(indices):
            part = indices[done : done + self.size]
            try:
                results.append(work(part))
                done += len(part)
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(part) == 1:
                    raise UserError(
                        f"no memory for a single image at a time on {self.device}: {short(error)}"
                    ) from error
            # The memory is freed here, outside of `except`. Inside, the error still refers to the
            # tensors of the failed work.
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.size = len(part) // 2
            tqdm.write(
                f"out of memory with {len(part)} images at a time: going on with {self.size}",
                file=sys.stderr,
            )
        return results
