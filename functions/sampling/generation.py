"""From a trained model to images in memory: for the scripts and for training's grids.

The reverse loops of functions/samplers.py are called here, for as many images at a time as fit in memory.
"""

import argparse
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.pixels import to_uint8
from functions.noise_scheduler import NoiseScheduler
from functions.prediction import Denoiser
from functions.samplers import OnStep
from functions.sampling.options import SAMPLERS, SamplerOptions
from functions.support.checkpoint import SavedModel, load_into
from functions.support.device import choose_device, choose_precision, is_out_of_memory
from functions.support.diffusers_folder import load_model
from functions.support.errors import CheckpointError, UserError
from functions.support.files import short
from functions.support.processes import Processes
from functions.support.random_numbers import ImageNoise
from functions.support.run_folder import find_checkpoints, first_sound, newest_checkpoints

Result = TypeVar("Result")
# ("x", k): the state after k network calls, 0 the noise; ("x_0", k): the x_0 that the k-th call predicts
Frame = tuple[str, int]


@dataclass
class Samples:
    """Images and, of the way to them, the frames that were asked for."""

    images: Tensor  # (N, C, H, W) in [-1, 1], on the CPU
    frames: dict[Frame, np.ndarray]  # uint8 (N, H, W, C) each

    @staticmethod
    def joined(batches: Sequence["Samples"]) -> "Samples":
        """One after the other."""
        frames = {
            frame: np.concatenate([batch.frames[frame] for batch in batches])
            for frame in batches[0].frames
        }
        return Samples(torch.cat([batch.images for batch in batches]), frames)


@dataclass(frozen=True)
class ImageSampler:
    """All that decides what image i is. `UserError` when the options ask for more steps than the model has."""

    denoiser: Denoiser
    options: SamplerOptions
    shape: tuple[int, int, int]  # (C, H, W)
    seed: int
    device: torch.device
    # Sees every step, and decides nothing
    watch: OnStep | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        self.options.times(self.scheduler)

    @property
    def scheduler(self) -> NoiseScheduler:
        return self.denoiser.scheduler

    def quick(self, seed: int) -> "ImageSampler":
        """With 20 steps of dpm++, whose fresh noise keeps samples sound."""
        options = SamplerOptions(
            "dpm++", min(20, self.scheduler.timesteps), clip_x_0=self.options.clip_x_0
        )
        return replace(self, options=options, seed=seed)

    def noise(self, images: Sequence[int], purpose: str = "image") -> ImageNoise:
        """The noise that these images are sampled from, x_T first, then each step's; or that for another purpose."""
        return ImageNoise(self.seed, images, self.shape, self.device, purpose)

    def decode(
        self, x_t: Tensor, t: int, noise: Callable[[], Tensor], on_step: OnStep | None = None
    ) -> Tensor:
        """States (B, C, H, W) at timestep t -> images, in the sampler's steps from there on; at -1 they are images."""
        return (
            self.run(x_t, self.options.times(self.scheduler, t), noise, on_step) if t >= 0 else x_t
        )

    def run(
        self,
        x: Tensor,
        times: list[int],
        noise: Callable[[], Tensor],
        on_step: OnStep | None = None,
    ) -> Tensor:
        """States (B, C, H, W) at the first of falling timesteps -> states at the last."""
        sampler, own = (
            SAMPLERS[self.options.sampler],
            {**self.options.own, "clip_x_0": self.options.clip_x_0},
        )
        step_noise = lambda k: noise()

        def each(*step: object) -> None:
            for see in filter(None, (on_step, self.watch)):
                see(*step)

        return sampler(
            self.denoiser, self.scheduler, x, times, **own, step_noise=step_noise, on_step=each
        )

    def sample(self, images: Sequence[int], frames: Collection[Frame], bar: tqdm) -> Samples:
        """Sample these images, all at once; the bar counts one step for each image."""
        noise, kept = self.noise(images), {}

        def keep(frame: Frame, x: Tensor) -> None:
            if frame in frames:
                kept[frame] = to_uint8(x).cpu().numpy()

        def on_step(k: int, t: int, x: Tensor, x_0: Tensor) -> None:
            keep(("x", k + 1), x)
            keep(("x_0", k + 1), x_0)
            bar.update(len(images))

        x_T = noise.draw()
        keep(("x", 0), x_T)
        x_0 = self.decode(x_T, self.scheduler.timesteps - 1, noise.draw, on_step)
        return Samples(x_0.cpu(), kept)


def open_sampler(
    args: argparse.Namespace, processes: Processes, build_model: Callable, experiments: str = ""
) -> tuple[SavedModel, ImageSampler]:
    """Return the newest sound checkpoint that the flags of `add_sampling_flags` mean, and its sampler, uncalibrated."""
    device = choose_device(args.device, processes.local_rank if processes.count > 1 else None)
    precision = choose_precision(args.precision, device)
    SamplerOptions.from_args(args)  # so that what cannot be is refused before anything is read
    read = cache(load_model)  # so that rank 0, which reads it to find it, does not do so twice
    find = lambda: (
        find_checkpoints(args.checkpoint)
        if args.checkpoint
        else newest_checkpoints(args.runs, experiments)
    )
    saved = read(processes.from_main(lambda: first_sound(find(), read).path))
    processes.say(f"{saved.path}: {saved}")
    denoiser = rebuild(build_model, saved, device, precision)
    options = SamplerOptions.from_args(args, saved.config["diffusion"])
    return saved, ImageSampler(denoiser, options, saved.image_shape, args.seed, device)


def rebuild(
    build_model: Callable,
    saved: SavedModel,
    device: torch.device,
    precision: torch.dtype = torch.float32,
) -> Denoiser:
    """Rebuild network and schedule from what a checkpoint says alone; its config's `model` fields go to `build_model`.

    Raises CheckpointError when its config and its weights do not fit each other.
    """
    try:
        diffusion, fields = saved.config["diffusion"], saved.config["model"]
        # Far above any model's; beyond, building the tables or the levels would take all memory or all day
        largest = {"timesteps_diff": 10**6, "image_size": 2**14, "base_dim": 2**14, "levels": 15}
        found = {**diffusion, **fields, "levels": len(fields["dim_multiply"])}
        for name, most in largest.items():
            if found[name] > most:
                raise ValueError(f"{name} is above {most:,}")
        schedule = [
            diffusion[name]
            for name in ("timesteps_diff", "beta_start", "beta_end", "rescale_betas")
        ]
        # Older ones do not say
        scheduler = NoiseScheduler(*schedule, diffusion.get("beta_schedule", "linear"))
        # Shapes only: nothing is initialised that is overwritten at once
        with torch.device("meta"):
            model = build_model(**fields)
        denoiser = Denoiser(model, scheduler, precision, diffusion.get("objective", "eps"))
        for name, known in (("objective", ("eps", "v")), ("variance", ("small", "large"))):
            if diffusion.get(name, known[0]) not in known:
                raise ValueError(f"{name} is {diffusion[name]!r}; it can be {' or '.join(known)}")
    except (
        KeyError,
        TypeError,
        ValueError,
        RuntimeError,
        ArithmeticError,
        AttributeError,
    ) as error:
        what = f"{type(error).__name__}: {short(error)}"
        raise CheckpointError(
            f"{saved.path}: its config describes no model of this version: {what}"
        ) from error
    load_into(model, saved)
    # Without gradients in float32 this was the faster layout on 2 CPU cores too: 3.5 against 4.7 ms a face
    model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    return denoiser


def generate(
    image_sampler: ImageSampler,
    images: Sequence[int],
    batch_size: int,
    frames: Collection[Frame] = (),
) -> Samples:
    """Sample images by their numbers i, at most `batch_size` at a time; image i depends on (seed, i) alone."""
    with image_sampler.denoiser.evaluating():
        return Samples.joined(
            [*generate_batches(image_sampler, batches_of(images, batch_size), frames)]
        )


def batches_of(images: Sequence[int], batch_size: int) -> list[Sequence[int]]:
    """Cut into batches; the last may be smaller."""
    return [images[start : start + batch_size] for start in range(0, len(images), batch_size)]


def generate_batches(
    image_sampler: ImageSampler,
    batches: list[Sequence[int]],
    frames: Collection[Frame] = (),
    progress: bool = False,
) -> Iterator[Samples]:
    """Yield for each batch of image numbers its `Samples`, made when they are asked for.

    What does not fit in memory is sampled by halves: that batch and those after it.
    """
    if image_sampler.device.type == "cuda":
        denoiser = image_sampler.denoiser
        image_sampler = replace(
            image_sampler, denoiser=replace(denoiser, network=Replayed(denoiser.network))
        )
    limit, steps = (
        BatchLimit(image_sampler.device),
        len(image_sampler.options.times(image_sampler.scheduler)) - 1,
    )
    total = steps * sum(map(len, batches))
    with tqdm(
        desc="sampling", total=total, unit="step", unit_scale=True, disable=not progress
    ) as bar:
        for batch in batches:
            yield Samples.joined(
                limit.in_parts(lambda some: image_sampler.sample(some, frames, bar), batch)
            )


class Replayed:
    """A network on CUDA, recorded as a CUDA graph for the host to launch as one, not as a thousand kernels.

    It is recorded for each size of a batch anew: filled up, a smaller one would have other bits than one of its own.
    """

    def __init__(self, network: nn.Module):
        self.network, self.graph, self.inputs, self.output = network, None, (), None

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """As the network, without gradients; the result is the caller's, as a replay overwrites the graph's."""
        if not self.inputs or len(self.inputs[0]) != len(x_t):
            self.graph, self.inputs, self.output = None, (), None  # their memory first
            # Here cuDNN tries its kernels, which it cannot while it is recorded
            self.network(x_t, t)
            inputs, graph = (x_t.clone(), t.clone()), torch.cuda.CUDAGraph()
            # Other threads may go on
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.output = self.network(*inputs)
            self.graph, self.inputs = graph, inputs
        for own, new in zip(self.inputs, (x_t, t), strict=True):
            own.copy_(new)
        self.graph.replay()
        return self.output.clone()


class BatchLimit:
    """How many images fit in memory, at first `most`: work on more is halved, and so is all that follows."""

    def __init__(self, device: torch.device, most: int = sys.maxsize):
        self.device, self.most = device, most

    def in_parts(
        self, work: Callable[[Sequence[int]], Result], images: Sequence[int]
    ) -> list[Result]:
        """What `work` returns for each part of the images, at most `most`; UserError if there is no memory for one."""
        results, done = [], 0
        while done < len(images):
            some = images[done : done + self.most]
            try:
                results.append(work(some))
                done += len(some)
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(some) == 1:
                    message = (
                        f"no memory for a single image at a time on {self.device}: {short(error)}"
                    )
                    raise UserError(message) from error
            # Here, where the error no longer holds on to what did not fit
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.most = len(some) // 2
            tqdm.write(
                f"out of memory with {len(some)} images at a time: going on with {self.most}",
                file=sys.stderr,
            )
        return results


def frame_steps(steps: int, count: int) -> list[int]:
    """`count` numbers of steps from 0 to `steps`, denser at the end, where the image takes shape."""
    return sorted({round((1 - (1 - i / (count - 1)) ** 1.5) * steps) for i in range(count)})
