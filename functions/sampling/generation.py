"""Sample images with a trained model, its guide and its enlargers, for scripts and training."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from config import DiffusionConfig
from data.batches import batches_of
from data.conditions import CONDITIONS, Given, chosen_inputs
from functions.denoiser import Predictor
from functions.enlarging import Known, enlarge, enlarging_times
from functions.guidance import Guided
from functions.noise_scheduler import NoiseScheduler
from functions.samplers import SAMPLERS, OnStep
from functions.sampling.options import SamplerOptions
from functions.sampling.recipes import model_of
from functions.saved.checkpoint import Checkpoint, SavedModel
from functions.saved.loading import open_model
from functions.saved.run_folder import checkpoints_of, newest_run, step_of
from functions.support import processes
from functions.support.device import choose_device, set_deterministic, warn_if_busy
from functions.support.errors import UserError
from functions.support.random_numbers import image_noise
from functions.support.settings import fields_with
from functions.timesteps import sampling_times

# So many images are sampled at a time unless --batch-size says otherwise. On a CPU larger batches
# are not faster, and when memory runs out, Linux kills the process without an error.
GPU_BATCH = 64
CPU_BATCH = 16
# After so many seconds it is said if other programs keep the cores busy.
CHECKED_SECONDS = 10
# The temperature scales the noise that is added above this log-SNR. Below it, the noise decides
# what is in the picture: with less of it there, faces are bald, in front of empty backgrounds.
COOLED_LOG_SNR = -1.0


class Enlarger(NamedTuple):
    """A model that draws images at twice their size (functions/enlarging.py)."""

    denoiser: Predictor
    # False for a few models from diffusers folders.
    clip_x_0: bool = True


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
    enlargers: tuple[Enlarger, ...] = ()
    # What is known of the model (data/conditions.py)
    facts: dict = field(default_factory=dict)
    # What the network gets beside x_t and t, (N, ...) by name; image i gets that of i mod N. Only a
    # training, which draws grids, gives it.
    inputs: dict[str, Tensor] = field(default_factory=dict)
    # Where the denoiser comes from; a training, which draws grids, has not saved it.
    saved: SavedModel | None = None

    def __post_init__(self) -> None:
        # This raises the error.
        _ = self.times

    def __str__(self) -> str:
        """Return the options, the seed and the precision."""
        return f"{self.options}, seed {self.seed}, {self.precision}"

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

    def enlarged_shape(self, count: int | None = None) -> tuple[int, int, int]:
        """Return the shape of images after so many enlargements, by default all."""
        factor = 2 ** (len(self.enlargers) if count is None else count)
        channels, height, width = self.shape
        return channels, height * factor, width * factor

    @property
    def step_count(self) -> int:
        """Return the number of steps. Each makes one network call, or two with a guide."""
        return len(self.times) - 1

    def noise(
        self, indices: Sequence[int], purpose: str = "image", enlargements: int = 0
    ) -> Callable[[], Tensor]:
        """Return what draws the noise of these images: first x_T, then that of the steps."""
        shape = self.enlarged_shape(enlargements)
        return image_noise(self.seed, indices, shape, self.device, purpose)

    def denoise(self, x_t: Tensor, t: int, noise: Callable[[], Tensor]) -> Tensor:
        """Denoise states (B, C, H, W) at t, one of the sampler's timesteps, to images."""
        return self.take_steps(x_t, [s for s in self.times if s <= t], noise)

    def take_steps(self, x: Tensor, times: list[int], noise: Callable[[], Tensor]) -> Tensor:
        """Run the sampler on states (B, C, H, W) from times[0] to times[-1] (descending).

        `noise()` draws a step's standard normal noise (B, C, H, W). The temperature scales it in
        steps that end above COOLED_LOG_SNR.
        """

        def step_noise(k):
            cooled = self.scheduler.log_snr(times[k + 1]) > COOLED_LOG_SNR
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
        sampler = replace(self, denoiser=self.given(indices), on_step=on_step)
        images = sampler.take_steps(noise(), self.times, noise)
        return self.enlarge(images, indices, on_step=lambda *step: bar.update(len(indices)))

    def given(self, indices: Sequence[int]) -> Predictor:
        """Return the denoiser with the inputs that its network gets for these images, if any.

        With `cfg` it is guided by the denoiser without any condition.
        """
        inputs = {
            name: values[[i % len(values) for i in indices]] for name, values in self.inputs.items()
        }
        chosen = chosen_inputs(self.options, self.facts, indices, self.options.cfg)
        inputs |= {name: values.to(self.device) for name, values in chosen.items()}
        denoiser = self.denoiser.given(**inputs)
        if self.options.cfg is None:
            return denoiser
        others = {name: values for name, values in inputs.items() if name not in CONDITIONS}
        return Guided(denoiser, self.denoiser.given(**others), self.options.cfg)

    def for_edits(self) -> "ImageSampler":
        """Return the sampler whose denoiser has the inputs of image 0 in all that it draws."""
        nothing = {each.name: each.default for each in fields(Given)}
        options = replace(self.options, **nothing, cfg=None)
        return replace(self, denoiser=self.given([0]), options=options, facts={})

    def enlarge(
        self,
        images: Tensor,
        indices: Sequence[int],
        purpose: str = "details",
        known: Sequence[Known | None] = (),
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Let the enlargers draw images (B, C, H, W) at twice their size each, on the CPU.

        Args:
            indices: those of the details' noise; a single one for the same noise in all images.
            purpose: the noise of another purpose is other noise.
            known: for each enlarger the pixels that it must keep.
        """
        known = known or [None] * len(self.enlargers)
        for k, (model, kept) in enumerate(zip(self.enlargers, known, strict=True), start=1):
            details = self.noise(indices, f"{purpose} {k}", k)
            images = enlarge(model.denoiser, images, details, kept, on_step, model.clip_x_0)
        return images.cpu()


def open_drawing(args: argparse.Namespace) -> ImageSampler:
    """Load the model, the guide and the enlargers that the flags of sampling name.

    Raises UserError for models that do not fit each other, and as `open_sampler` does.
    """
    image_sampler = open_sampler(args)
    # This raises errors about conditions.
    image_sampler.given([0])
    image_sampler = guided(image_sampler)
    for path in args.enlarge:
        image_sampler = enlarged(image_sampler, path)
    return image_sampler


def open_sampler(args: argparse.Namespace) -> ImageSampler:
    """Load the model that the flags of sampling name, or the model of their recipe, alone.

    The newest intact checkpoint of a run is loaded; without RUN that of the newest run. Raises
    UserError for flags that the machine or the model cannot satisfy.
    """
    device = choose_device(args.device)
    set_deterministic(False)
    path = model_of(args.checkpoint or processes.on_main(newest_run, args.runs))
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
        str(denoiser.precision).removeprefix("torch."),
        facts=saved.facts,
        saved=saved,
    )


def guided(image_sampler: ImageSampler) -> ImageSampler:
    """Return the sampler with the guide that its options name, if any (functions/guidance.py).

    The guide computes in the model's precision. Raises UserError for a guide with another noise
    schedule or another shape of images, and when `find_guide` finds none.
    """
    options = image_sampler.options
    if options.guide is None:
        return image_sampler
    # The guide keeps its own objective, and its network may have another size.
    model = image_sampler.denoiser
    saved = image_sampler.saved
    path = processes.on_main(find_guide, options.guide, saved)
    saved_guide, guide = open_model(path, image_sampler.device, image_sampler.precision)
    processes.print_main(f"guide {saved_guide.path}: {saved_guide}")
    for name, row in CONDITIONS.items():
        if getattr(options, name) and row.known(saved_guide.facts) != row.known(saved.facts):
            raise UserError(f"{saved_guide.path} cannot guide {saved.path}: other {row.switch}")
    # Both networks get the same x_t and t, so t must mean the same amount of noise to both.
    same_shape = saved_guide.model.image_shape == image_sampler.shape
    alphas_cumprod = model.scheduler.alphas_cumprod
    if not same_shape or not torch.equal(guide.scheduler.alphas_cumprod, alphas_cumprod):
        raise UserError(
            f"{saved_guide.path} cannot guide {saved.path}: it has another shape of images, or "
            "another noise schedule (the number of timesteps, or the betas)"
        )

    return replace(
        image_sampler,
        denoiser=Guided(model, guide, options.guide_weight),
        # Manifests and the names of folders contain its first 16 digits, so that images of one
        # guide are never taken for images of another guide, or of none.
        options=replace(options, guide=saved_guide.digest[:16]),
    )


def enlarged(image_sampler: ImageSampler, path: Path) -> ImageSampler:
    """Return the sampler with one more model, at `path`, which draws images at twice their size.

    That model has its own schedule, and the precision of the sampler's (functions/enlarging.py).
    Raises UserError for a model of another size, and CheckpointError when there is none.
    """
    saved, denoiser = open_model(path, image_sampler.device, image_sampler.precision)
    processes.print_main(f"enlarged by {saved.path}: {saved}")
    enlargers = image_sampler.enlargers
    shape = image_sampler.enlarged_shape(len(enlargers) + 1)
    if saved.model.image_shape != shape:
        raise UserError(
            f"{saved.path} draws images of {saved.model.image_shape} (channels, height, width); "
            f"to enlarge these samples it must draw {shape}"
        )
    enlarger = Enlarger(denoiser, saved.config["diffusion"].get("clip_x_0", True))
    options = image_sampler.options
    # Manifests and names of folders contain the digests, as that of a guide.
    digests = (*options.enlarger_digests, saved.digest[:16])
    return replace(
        image_sampler,
        enlargers=(*enlargers, enlarger),
        options=replace(options, enlarger_digests=digests),
    )


def find_guide(guide: str, saved: SavedModel) -> Path:
    """Return the path of the guide of `saved`.

    `guide` is that path, or a step: then it is the nearest of the earlier snapshots and checkpoints
    of the model's run, or the guide beside an exported file, which must be of this step. Raises
    UserError when there is none.
    """
    if not guide:
        raise UserError('--guide "" names neither a step nor a model')
    if not guide.isdecimal():
        return Path(guide)
    beside = guide_beside(saved.path)
    if beside.is_file():
        step = Checkpoint(beside).contents["run"]["step"]
        if step != int(guide):
            raise UserError(f"{beside} is of step {step}: use --guide {step}")
        return beside
    folder = saved.path.absolute().parent
    files = []
    # A file that is elsewhere in a run's folder may come from another run.
    if folder.name in ("checkpoints", "snapshots"):
        # Of several equally near files `min` returns the first. The snapshots are listed first,
        # because the run may later delete a checkpoint.
        files = [*checkpoints_of(folder.parent, "snapshots"), *checkpoints_of(folder.parent)]
    earlier = [file for file in files if step_of(file) < saved.provenance["step"]]
    nearest = min(earlier, key=lambda file: abs(step_of(file) - int(guide)), default=None)
    if not nearest or not of_one_run(saved.config, Checkpoint(nearest).contents["config"]):
        raise UserError(
            f"{saved.path} has no earlier snapshots in its run for --guide {guide}, and there is "
            f"no {beside.name} beside it; name a model, or train with --diffusion.snapshot-every"
        )
    return nearest


def of_one_run(config: dict, other: dict) -> bool:
    """Return whether two configs are equal but for what a resumed run can change."""
    may_change = {"batch_size", "gradient_accumulation"}
    may_change |= fields_with(DiffusionConfig, "changeable")
    # Another version may have written one of them, with fewer or more fields.
    values = other["diffusion"] | other["model"]
    fields = (config["diffusion"] | config["model"]).items()
    return all(values.get(name, value) == value for name, value in fields if name not in may_change)


def guide_beside(model: Path) -> Path:
    """Return where the guide of an exported NAME.safetensors is, if it has one."""
    return model.parent / f"{model.stem}-guide{model.suffix}"


def generate(image_sampler: ImageSampler, indices: Sequence[int], progress: bool = False) -> Tensor:
    """Sample the images with these indices, in batches of the sampler's size.

    Returns (N, C, H, W) in [-1, 1], on the CPU. Each enlarger doubles H and W.
    """
    batches = batches_of(indices, image_sampler.batch_size)
    with step_bar(image_sampler, len(indices), progress) as bar:
        return torch.cat([image_sampler.sample(batch, bar) for batch in batches])


def step_bar(image_sampler: ImageSampler, count: int, shown: bool) -> tqdm:
    """Return a progress bar for the steps of `count` images."""
    schedulers = [enlarger.denoiser.scheduler for enlarger in image_sampler.enlargers]
    details = sum(len(enlarging_times(scheduler)) - 1 for scheduler in schedulers)
    total = count * (image_sampler.step_count + details)
    bar = StepBar(desc="sampling", total=total, unit="step", unit_scale=True, disable=not shown)
    bar.is_checked = image_sampler.device.type != "cpu"
    return bar


class StepBar(tqdm):
    """A progress bar that says once, if it is so, that other programs keep the cores busy."""

    is_checked = False

    def update(self, n: float = 1) -> None:
        super().update(n)
        if not (self.disable or self.is_checked) and self.format_dict["elapsed"] > CHECKED_SECONDS:
            self.is_checked = True
            warn_if_busy("start again")
