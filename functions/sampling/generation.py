"""Draw images with loaded models, for scripts and the page."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.pixels import to_uint8
from functions.denoiser import Predictor
from functions.guidance import Guided, asks_guide
from functions.noise_scheduler import NoiseScheduler
from functions.samplers import SAMPLERS, OnStep
from functions.sampling.models import Models, chosen_labels, open_models
from functions.sampling.settings import SamplingConfig, SamplingFlags, default_settings
from functions.super_resolution.enlarging import Keep, enlarge, enlarging_times
from functions.support.errors import UserError
from functions.support.processes import batches_of
from functions.support.random_numbers import image_noise
from functions.timesteps import sampling_times

# So many images are sampled at a time unless --batch-size says otherwise. On a CPU larger batches
# are not faster, and when memory runs out, Linux kills the process without an error.
GPU_BATCH = 64
CPU_BATCH = 16
# The temperature scales the noise that is added above this log-SNR. Below it, the noise decides
# what is in the picture: with less of it there, faces are bald, in front of empty backgrounds.
TEMPERATURE_MIN_LOG_SNR = -1.0
# It draws the next standard normal noise of a batch, (B, C, H, W).
Noise = Callable[[], Tensor]


@dataclass(frozen=True)
class Pipeline:
    """Models, settings and a seed, which make image i reproducible.

    Raises UserError when the settings ask for more steps than the model has timesteps, and for a
    guide that no step asks.
    """

    models: Models
    config: SamplingConfig
    seed: int = 0

    def __post_init__(self) -> None:
        steps, timesteps = self.config.steps, self.scheduler.timesteps
        if steps and steps > timesteps:
            raise UserError(
                f"steps is {steps}; a model with {timesteps} timesteps takes 1 to {timesteps}"
            )
        guides = {self.config.guide, self.config.cfg} != {None}
        if guides and not any(asks_guide(self.scheduler, t) for t in self.times):
            raise UserError(
                f"--steps {self.step_count}: no step is at a noise level at which --guide or --cfg "
                "changes anything; take more steps"
            )

    def __str__(self) -> str:
        """Return a text such as "seed 0, precision float32, sampler dpm++, steps 20, ..."."""
        return ", ".join(f"{name} {value}" for name, value in self.settings.items())

    @property
    def settings(self) -> dict[str, Any]:
        """All that determines the pixels, with digests in place of models, for manifests."""
        config, models = self.config, self.models
        values = vars(config) | config.arguments
        values |= {"precision": models.precision, "steps": self.step_count}
        if config.guide is not None:
            values |= {"guide": models.guide.saved.digest[:16], "guidance": config.guide_weight}
        values["enlarge"] = tuple(each.saved.digest[:16] for each in models.enlargers)
        if config.inputs is not None:
            values["inputs"] = hashlib.sha256(Path(config.inputs).read_bytes()).hexdigest()[:16]
        values["clip_x_0"] = None if models.clip_x_0 else False
        # A manifest has a digest of the model, and the batch size changes pixels only by rounding.
        values |= {"model": None, "batch_size": None}
        used = {name: value for name, value in values.items() if value not in (None, ())}
        return {"seed": self.seed} | used

    @property
    def scheduler(self) -> NoiseScheduler:
        return self.models.denoiser.scheduler

    @property
    def times(self) -> list[int]:
        """The timesteps from T - 1 down to -1 (the clean image)."""
        return sampling_times(self.scheduler, self.config.steps, self.config.arguments["spacing"])

    @property
    def step_count(self) -> int:
        """The number of steps. Each makes one network call, or two with a guide."""
        return len(self.times) - 1

    @property
    def batch_size(self) -> int:
        """At most so many images are sampled at a time. It affects pixels only by rounding."""
        is_cpu = self.models.device.type == "cpu"
        return self.config.batch_size or (CPU_BATCH if is_cpu else GPU_BATCH)

    def noise(self, indices: Sequence[int], purpose: str = "image") -> Noise:
        """Return what draws the noise of these images: first x_T, then that of the steps."""
        return image_noise(self.seed, indices, self.models.shape, self.models.device, purpose)


def open_pipeline(flags: SamplingFlags) -> Pipeline:
    """Load the models of the settings. Raises UserError as `open_models` and `Pipeline` do."""
    config = flags.sampling
    models = open_models(config, flags.device)
    timesteps = models.denoiser.scheduler.timesteps
    # The config of a diffusers folder names a variance, which is meant only for sampling over all
    # timesteps.
    if config.sampler == "ddpm" and not config.variance and config.steps in (None, timesteps):
        config = replace(config, variance=models.saved.config["diffusion"].get("variance"))
    return Pipeline(models, config, flags.seed)


def draw(
    path: Path | str, n: int, seed: int = 0, device: str = "auto", **settings: Any
) -> np.ndarray:
    """Draw images 0 .. n-1 of a seed as sample.py does: uint8 (n, H, W, C).

    `path` is its RUN, such as a recipe, and `settings` are fields of `SamplingConfig`.
    """
    config = replace(default_settings(Path(path)), **settings)
    pipeline = open_pipeline(SamplingFlags(device=device, seed=seed, sampling=config))
    return to_uint8(generate(pipeline, range(n), progress=True))


def given(pipeline: Pipeline, indices: Sequence[int]) -> Predictor:
    """Return the denoiser with the labels and the inputs of these images, if there are any.

    It is guided by the guide of the settings, or with `cfg` by itself without these. A single
    index is for all images.
    """
    models, config = pipeline.models, pipeline.config
    inputs = {}
    if config.label:
        label = chosen_labels(config.label, models.label_names, indices)
        inputs = {"label": label.to(models.device)}
    for name, values in models.inputs.items():
        inputs[name] = values[[i % len(values) for i in indices]]
    denoiser = models.denoiser.given(**inputs)
    if config.cfg is not None:
        return Guided(denoiser, models.denoiser, config.cfg)
    if config.guide is not None:
        return Guided(denoiser, models.guide.denoiser.given(**inputs), config.guide_weight)
    return denoiser


def take_steps(
    pipeline: Pipeline,
    denoiser: Predictor,
    x: Tensor,
    times: list[int],
    noise: Noise,
    on_step: OnStep | None = None,
) -> Tensor:
    """Run the sampler on states (B, C, H, W) from times[0] to times[-1] (descending).

    The denoiser is that of `given`, or what wraps it. `noise()` draws a step's noise. The
    temperature scales it in steps that end above TEMPERATURE_MIN_LOG_SNR.
    """
    config = pipeline.config

    def step_noise(k):
        cooled = pipeline.scheduler.log_snr(times[k + 1]) > TEMPERATURE_MIN_LOG_SNR
        return (config.temperature if cooled else 1.0) * noise()

    return SAMPLERS[config.sampler].function(
        denoiser,
        x,
        times,
        **config.arguments,
        clip_x_0=pipeline.models.clip_x_0,
        step_noise=step_noise,
        on_step=on_step,
    )


def sample_batch(
    pipeline: Pipeline, indices: Sequence[int], bar: tqdm, on_step: OnStep | None = None
) -> Tensor:
    """Sample these images at once: (B, C, H, W) in [-1, 1], on the CPU.

    Each enlarger doubles H and W. The bar is a `step_bar`. `on_step` is called after the sampler's
    steps, and not after those of an enlargement.
    """

    def after_step(*step):
        bar.update(len(indices))
        if on_step:
            on_step(*step)

    noise = pipeline.noise(indices)
    denoiser = given(pipeline, indices)
    images = take_steps(pipeline, denoiser, noise(), pipeline.times, noise, after_step)
    return enlarge_images(pipeline, images, indices, on_step=lambda *_: bar.update(len(indices)))


def enlarge_images(
    pipeline: Pipeline,
    images: Tensor,
    indices: Sequence[int],
    purpose: str = "details",
    keep: Sequence[Keep | None] = (),
    on_step: OnStep | None = None,
) -> Tensor:
    """Let the enlargers draw images (B, C, H, W) at twice their size each, on the CPU.

    Args:
        indices: those of the details' noise; a single one for the same noise in all images.
        purpose: the noise of another purpose is other noise.
        keep: for each enlarger what puts the known pixels into its images.
    """
    enlargers = pipeline.models.enlargers
    keep = keep or [None] * len(enlargers)
    for k, (model, kept) in enumerate(zip(enlargers, keep, strict=True), start=1):
        noise = image_noise(pipeline.seed, indices, model.shape, model.device, f"{purpose} {k}")
        images = enlarge(model.denoiser, images, noise, kept, on_step)
    return images.cpu()


def generate(
    pipeline: Pipeline,
    indices: Sequence[int],
    progress: bool = False,
    on_step: OnStep | None = None,
) -> Tensor:
    """Sample the images with these indices, in batches: (N, C, H, W) in [-1, 1], on the CPU.

    Each enlarger doubles H and W. `on_step` is called after each of the sampler's steps.
    """
    batches = batches_of(indices, pipeline.batch_size)
    with step_bar(pipeline, len(indices), progress) as bar:
        return torch.cat([sample_batch(pipeline, batch, bar, on_step) for batch in batches])


def step_bar(pipeline: Pipeline, count: int, shown: bool) -> tqdm:
    """Return a progress bar for the steps of `count` images."""
    enlargers = pipeline.models.enlargers
    details = sum(
        len(enlarging_times(each.denoiser.scheduler, each.shape[-1] // 2)) - 1 for each in enlargers
    )
    total = count * (pipeline.step_count + details)
    return tqdm(desc="sampling", total=total, unit="step", unit_scale=True, disable=not shown)
