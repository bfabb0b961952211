"""Sample images with a trained model, for the scripts and for training's grids."""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from data.batches import batches_of
from functions.denoiser import Predictor
from functions.enlarging import enlarge, enlarging_times
from functions.noise_scheduler import NoiseScheduler
from functions.samplers import SAMPLERS, OnStep
from functions.sampling.options import SamplerOptions
from functions.saved.checkpoint import SavedModel
from functions.saved.loading import open_model
from functions.saved.run_folder import newest_run
from functions.support import processes
from functions.support.device import choose_device, precision_name, set_deterministic
from functions.support.errors import UserError
from functions.support.random_numbers import image_noise
from functions.timesteps import sampling_times

# So many images are sampled at a time unless --batch-size says otherwise. On a CPU larger batches
# are not faster, and when memory runs out, Linux kills the process without an error.
GPU_BATCH = 64
CPU_BATCH = 16
# The temperature scales the noise that is added above this log-SNR. Below it, the noise decides
# what is in the picture: with less of it there, faces are bald, in front of empty backgrounds.
COOLED_LOG_SNR = -1.0


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
    # The precision of the denoiser's network, by its name.
    precision: str = "float32"
    # The sampler calls this after every step.
    on_step: OnStep | None = None
    # Each of them then draws the images at twice their size. They do not call `on_step`.
    enlargers: tuple[Predictor, ...] = ()
    # Where the denoiser comes from; a training, which draws grids, has not saved it.
    saved: SavedModel | None = None

    def __post_init__(self) -> None:
        # This raises the error.
        _ = self.times

    @property
    def scheduler(self) -> NoiseScheduler:
        return self.denoiser.scheduler

    @property
    def times(self) -> list[int]:
        """Return the timesteps from T - 1 down to -1 (the clean image)."""
        try:
            spacing = self.options.arguments["spacing"]
            return sampling_times(self.scheduler, self.options.steps, spacing)
        except ValueError as error:
            raise UserError(str(error)) from error

    def time_at(self, depth: float) -> int:
        """Return the sampler's timestep nearest to `depth`, from 0 (the image) to 1 (noise)."""
        return min(self.times, key=lambda t: abs(t + 1 - depth * self.scheduler.timesteps))

    def enlarged_shape(self, count: int) -> tuple[int, int, int]:
        """Return the shape of images after so many enlargements."""
        channels, height, width = self.shape
        return channels, height * 2**count, width * 2**count

    @property
    def step_count(self) -> int:
        """Return the number of steps. Each makes one network call, or two with a guide."""
        return len(self.times) - 1

    def noise(self, indices: Sequence[int], purpose: str = "image") -> Callable[[], Tensor]:
        """Return what draws the noise of these images: first x_T, then that of the steps."""
        return image_noise(self.seed, indices, self.shape, self.device, purpose)

    def denoise(self, x_t: Tensor, t: int, noise: Callable[[], Tensor]) -> Tensor:
        """Denoise states (B, C, H, W) at t, one of the sampler's timesteps, to images."""
        times = [s for s in self.times if s <= t]
        return self.take_steps(x_t, times, noise)

    def take_steps(self, x: Tensor, times: list[int], noise: Callable[[], Tensor]) -> Tensor:
        """Run the sampler on states (B, C, H, W) from times[0] to times[-1] (descending).

        `noise()` draws a step's standard normal noise (B, C, H, W). The temperature scales it in
        steps that end above COOLED_LOG_SNR.
        """

        def step_noise(k):
            alpha_bar = self.scheduler.alpha_bar(times[k + 1])
            cooled = alpha_bar > (1 - alpha_bar) * math.exp(COOLED_LOG_SNR)
            return (self.options.temperature if cooled else 1.0) * noise()

        return SAMPLERS[self.options.sampler].function(
            self.denoiser,
            x,
            times,
            **self.options.arguments,
            clip_x_0=self.options.clip_x_0,
            step_noise=step_noise,
            on_step=self.on_step,
        )

    def sample(self, indices: Sequence[int], bar: tqdm) -> Tensor:
        """Sample these images as one batch: (B, C, H, W) in [-1, 1], on the CPU.

        Each enlarger doubles H and W. The bar is a `step_bar`.
        """

        def on_step(k, t, x, x_0):
            bar.update(len(indices))
            if self.on_step:
                self.on_step(k, t, x, x_0)

        noise = self.noise(indices)
        sampler = replace(self, on_step=on_step)
        images = sampler.take_steps(noise(), self.times, noise)
        for k, model in enumerate(self.enlargers, start=1):
            shape = self.enlarged_shape(k)
            details = image_noise(self.seed, indices, shape, self.device, f"details {k}")
            images = enlarge(model, images, details, lambda *step: bar.update(len(indices)))
        return images.cpu()


def open_sampler(args: argparse.Namespace, name_prefix: str = "") -> ImageSampler:
    """Load the checkpoint that the flags name, and return a sampler for it.

    The flags are those of `add_sampling_flags`. The newest intact checkpoint of the run is loaded.
    Without a run in the flags, the newest run whose name begins with `name_prefix` is used. The
    sampler has no guide yet. Raises UserError for flags that the machine or the model cannot
    satisfy.
    """
    device = choose_device(args.device)
    set_deterministic(False)
    path = args.checkpoint or processes.on_main(newest_run, args.runs, name_prefix)
    saved, denoiser = open_model(path, device, args.precision)
    processes.print_main(f"{saved.path}: {saved}")

    names = SamplerOptions.__annotations__
    chosen = {name: value for name, value in vars(args).items() if name in names}
    # The config of a diffusers folder names a variance, which is meant only for sampling over all
    # timesteps. It may also turn clipping off.
    diffusion = saved.config["diffusion"]
    if args.sampler == "ddpm" and args.steps in (None, diffusion["timesteps_diff"]):
        chosen["variance"] = args.variance or diffusion.get("variance")
    options = SamplerOptions(**chosen, clip_x_0=diffusion.get("clip_x_0", True))

    batch_size = args.batch_size or (CPU_BATCH if device.type == "cpu" else GPU_BATCH)
    return ImageSampler(
        denoiser,
        options,
        saved.model.image_shape,
        args.seed,
        device,
        batch_size,
        precision_name(denoiser.precision),
        saved=saved,
    )


def generate(image_sampler: ImageSampler, indices: Sequence[int], progress: bool = False) -> Tensor:
    """Sample the images with these indices, in batches of the sampler's size.

    Returns (N, C, H, W) in [-1, 1], on the CPU. Each enlarger doubles H and W.
    """
    batches = batches_of(indices, image_sampler.batch_size)
    with step_bar(image_sampler, len(indices), progress) as bar:
        return torch.cat([image_sampler.sample(batch, bar) for batch in batches])


def step_bar(image_sampler: ImageSampler, count: int, shown: bool) -> tqdm:
    """Return a progress bar for the steps of `count` images."""
    details = sum(len(enlarging_times(model.scheduler)) - 1 for model in image_sampler.enlargers)
    total = count * (image_sampler.step_count + details)
    return tqdm(desc="sampling", total=total, unit="step", unit_scale=True, disable=not shown)
