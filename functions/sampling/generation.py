"""Sample images with a trained model, for the scripts and for training's grids.

The images stay in memory. The samplers are in functions/samplers.py.
"""

import argparse
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.pixels import to_uint8
from functions.denoiser import Predictor
from functions.noise_scheduler import NoiseScheduler
from functions.samplers import SAMPLERS, OnStep
from functions.sampling.options import SamplerOptions
from functions.support.checkpoint import SavedModel
from functions.support.device import choose_device, set_deterministic
from functions.support.errors import UserError
from functions.support.loading import open_model
from functions.support.processes import Processes
from functions.support.random_numbers import ImageNoise
from functions.support.run_folder import newest_checkpoints
from functions.timesteps import sampling_times

# So many images are sampled at a time unless --batch-size says otherwise. On a CPU larger batches
# are not faster, and when memory runs out, Linux kills the process without an error.
GPU_BATCH = 64
CPU_BATCH = 16
# ("x", k) is the state after k network calls, and ("x", 0) is the noise. ("x_0", k) is the x_0 that
# the k-th call predicts.
FrameKey = tuple[str, int]


@dataclass
class Samples:
    """Sampled images, and the denoising frames that the caller asked for."""

    # (N, C, H, W) in [-1, 1], on the CPU
    images: Tensor
    # uint8 (N, H, W, C) each
    frames: dict[FrameKey, np.ndarray]


@dataclass(frozen=True)
class ImageSampler:
    """Everything that sampling needs, so that image i of a seed is reproducible.

    Raises UserError when the options ask for more steps than the model has timesteps.
    """

    denoiser: Predictor
    options: SamplerOptions
    shape: tuple[int, int, int]  # (C, H, W)
    seed: int
    device: torch.device
    # At most this many images are sampled at a time. This affects pixels only through rounding.
    batch_size: int = GPU_BATCH
    # The precision of the denoiser's network.
    precision: torch.dtype = torch.float32
    # The sampler calls this after every step.
    on_step: OnStep | None = None

    def __post_init__(self) -> None:
        # This raises the error.
        _ = self.times

    @property
    def scheduler(self) -> NoiseScheduler:
        return self.denoiser.scheduler

    @property
    def times(self) -> list[int]:
        """Return the timesteps from T - 1 down to -1 (the clean image).

        Each step leads from one timestep to the next.
        """
        try:
            spacing = self.options.arguments["spacing"]
            return sampling_times(self.scheduler, self.options.steps, spacing)
        except ValueError as error:
            raise UserError(str(error)) from error

    def time_at(self, depth: float) -> int:
        """Return the sampler's timestep that is nearest to `depth`, a fraction of all timesteps.

        At depth 1 it is T - 1, and at depth 0 it is -1, the clean image.
        """
        return min(self.times, key=lambda t: abs(t + 1 - depth * self.scheduler.timesteps))

    @property
    def step_count(self) -> int:
        """Return the number of steps. Each makes one network call, or two with a guide."""
        return len(self.times) - 1

    def quick(self, seed: int) -> "ImageSampler":
        """Return this sampler with another seed and 20 steps of dpm++.

        dpm++ adds fresh noise, which keeps samples realistic in 20 steps.
        """
        steps = min(20, self.scheduler.timesteps)
        options = SamplerOptions("dpm++", steps, clip_x_0=self.options.clip_x_0)
        return replace(self, options=options, seed=seed)

    def noise(self, indices: Sequence[int], purpose: str = "image") -> ImageNoise:
        """Return the noise of the images with these indices: first x_T, then that of the steps.

        Different purposes have different noise.
        """
        return ImageNoise(self.seed, indices, self.shape, self.device, purpose)

    def denoise(self, x_t: Tensor, t: int, noise: Callable[[], Tensor]) -> Tensor:
        """Denoise states (B, C, H, W) at t, one of the sampler's timesteps, to images.

        At t = -1 the states already are images.
        """
        if t < 0:
            return x_t
        return self.take_steps(x_t, self.times[self.times.index(t) :], noise)

    def take_steps(self, x: Tensor, times: list[int], noise: Callable[[], Tensor]) -> Tensor:
        """Run the sampler on states (B, C, H, W) from times[0] to times[-1] (descending).

        `noise()` draws standard normal noise (B, C, H, W), and is called for each step that adds
        noise.
        """
        return SAMPLERS[self.options.sampler].function(
            self.denoiser,
            x,
            times,
            **self.options.arguments,
            clip_x_0=self.options.clip_x_0,
            step_noise=lambda k: noise(),
            on_step=self.on_step,
        )

    def sample(self, indices: Sequence[int], frames: Collection[FrameKey], bar: tqdm) -> Samples:
        """Sample the images with these indices as one batch; the bar counts steps of all images."""
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
    args: argparse.Namespace, processes: Processes, name_prefix: str = ""
) -> tuple[SavedModel, ImageSampler]:
    """Load the checkpoint that the flags name, and return it with a sampler for it.

    The flags are those of `add_sampling_flags`. The newest intact checkpoint of the run is loaded.
    Without a run in the flags, the newest run whose name begins with `name_prefix` is used. The
    sampler has no calibration yet. Raises UserError for flags that the machine or the model cannot
    satisfy.
    """
    # If there are several processes, each has its own GPU.
    index = processes.local_rank if processes.count > 1 else None
    device = choose_device(args.device, index)
    set_deterministic(False)
    # Options that fit no model are refused here, before a checkpoint is read.
    flags = vars(args).items()
    options = SamplerOptions(**{k: v for k, v in flags if k in SamplerOptions.__annotations__})

    path = args.checkpoint
    if not path:
        path = processes.on_main(lambda: newest_checkpoints(args.runs, name_prefix))
    saved, denoiser = open_model(path, device, args.precision, processes)
    processes.print_main(f"{saved.path}: {saved}")
    # The config of a diffusers folder names a variance, which is meant only for sampling over all
    # timesteps. It may also turn clipping off.
    diffusion = saved.config["diffusion"]
    if args.sampler == "ddpm" and args.steps in (None, diffusion["timesteps_diff"]):
        options = replace(options, variance=args.variance or diffusion.get("variance"))
    options = replace(options, clip_x_0=diffusion.get("clip_x_0", True))

    shape = saved.model.image_shape
    batch_size = args.batch_size or (CPU_BATCH if device.type == "cpu" else GPU_BATCH)
    precision = denoiser.precision
    return saved, ImageSampler(denoiser, options, shape, args.seed, device, batch_size, precision)


def generate(
    image_sampler: ImageSampler,
    indices: Sequence[int],
    frames: Collection[FrameKey] = (),
    progress: bool = False,
) -> Samples:
    """Sample the images with these indices, in batches of the sampler's size.

    The noise of image i depends only on (seed, i), so a different batch size changes its pixels
    only by rounding.
    """
    batches = batches_of(indices, image_sampler.batch_size)
    parts = list(generate_batches(image_sampler, batches, frames, progress))
    images = torch.cat([part.images for part in parts])
    return Samples(
        images, {frame: np.concatenate([part.frames[frame] for part in parts]) for frame in frames}
    )


def batches_of(indices: Sequence[int], batch_size: int) -> list[Sequence[int]]:
    """Split the indices into batches; the last may be smaller."""
    return [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]


def generate_batches(
    image_sampler: ImageSampler,
    batches: list[Sequence[int]],
    frames: Collection[FrameKey] = (),
    progress: bool = False,
) -> Iterator[Samples]:
    """Yield the `Samples` of each batch of indices; a batch is sampled when it is asked for."""
    total = image_sampler.step_count * sum(map(len, batches))
    with tqdm(
        desc="sampling", total=total, unit="step", unit_scale=True, disable=not progress
    ) as bar:
        for batch in batches:
            yield image_sampler.sample(batch, frames, bar)
