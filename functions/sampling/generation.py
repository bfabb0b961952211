"""From a trained model to images in memory: for the scripts and for training's grids.

The scripts hand in the model's class and the conversion to pixels, so that this module knows neither.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

from functions.noise_scheduler import NoiseScheduler
from functions.prediction import Denoiser
from functions.samplers import OnStep
from functions.sampling.fitting import BatchLimit
from functions.sampling.options import SamplerOptions
from functions.support.checkpoint import SavedModel, load_into
from functions.support.errors import CheckpointError
from functions.support.files import short
from functions.support.random_numbers import ImageNoise


@dataclass
class Samples:
    """Images x_0 (N, C, H, W) in [-1, 1], and what was kept on their way, by the number of network calls before it."""

    images: Tensor
    states: dict[int, Tensor] = field(default_factory=dict)  # x; 0 is the noise, and the last is the images
    predictions: dict[int, Tensor] = field(default_factory=dict)  # the model's x_0 in the last of these calls

    @staticmethod
    def joined(parts: Sequence["Samples"]) -> "Samples":
        """One after the other."""
        join = lambda name: {k: torch.cat([getattr(part, name)[k] for part in parts]) for k in getattr(parts[0], name)}
        return Samples(torch.cat([part.images for part in parts]), join("states"), join("predictions"))


@dataclass(frozen=True)
class Record:
    """What to keep of the way to the images: after which numbers of network calls, and in which form."""

    states: Sequence[int] = ()
    predictions: Sequence[int] = ()
    form: Callable[[Tensor], Tensor] = lambda x: x  # such as to uint8; on the device


NOTHING = Record()


@dataclass(frozen=True)
class ImageSampler:
    """All that decides what image i is."""

    denoiser: Denoiser
    settings: SamplerOptions
    shape: tuple[int, int, int]  # (C, H, W)
    seed: int
    device: torch.device

    @property
    def scheduler(self) -> NoiseScheduler:
        return self.denoiser.scheduler

    def noise(self, images: Sequence[int], purpose: str = "image") -> ImageNoise:
        """That which these images are drawn from, x_T first, then each step's; or that for another purpose."""
        return ImageNoise(self.seed, images, self.shape, self.device, purpose)

    def decode(self, x_t: Tensor, times: Sequence[int], noise: Callable[[], Tensor], on_step: OnStep | None = None):
        """The state (B, C, H, W) at the first of `times` -> images; `noise` is asked in each step that adds some."""
        return self.settings.sample(self.denoiser, self.scheduler, x_t, times, lambda k: noise(), on_step)


def rebuild(
    build_model: Callable[..., nn.Module],
    saved: SavedModel,
    device: torch.device,
    precision: torch.dtype = torch.float32,
) -> Denoiser:
    """Network and schedule of a checkpoint, from what the checkpoint says alone.

    Raises:
        CheckpointError: its config and its weights do not fit each other.
    """
    try:
        diffusion, fields = saved.config["diffusion"], saved.config["model"]
        # Far above any model's; beyond, building the tables or the levels would take all memory or all day
        largest = {"timesteps_diff": 10**6, "image_size": 2**14, "base_dim": 2**14, "levels": 15}
        found = {**diffusion, **fields, "levels": len(fields["dim_multiply"])}
        too_large = [f"{name} is above {most:,}" for name, most in largest.items() if found[name] > most]
        if too_large:
            raise ValueError(", ".join(too_large))
        scheduler = NoiseScheduler(
            diffusion["timesteps_diff"], diffusion["beta_start"], diffusion["beta_end"], diffusion["rescale_betas"]
        )
        with torch.device("meta"):  # shapes only: nothing is initialised that is overwritten at once
            model = build_model(**fields)
    except (KeyError, TypeError, ValueError, RuntimeError, ArithmeticError, AttributeError) as error:
        raise CheckpointError(
            f"{saved.path}: its config describes no model of this version: {type(error).__name__}: {short(error)}"
        ) from error
    load_into(model, saved)
    # Without gradients and in float32, channels_last was the faster layout on the CPU too: 3.5 against 4.7 ms an image
    # of the faces network on 2 cores.
    model.to(device, memory_format=torch.channels_last)
    return Denoiser(model.eval().requires_grad_(False), scheduler, precision=precision)


def generate(
    drawing: ImageSampler, images: Sequence[int], batch_size: int, keep: Record = NOTHING, progress: bool = True
) -> Samples:
    """Draw images, at most `batch_size` at a time; image i depends on (seed, i) alone, whatever the sampler.

    Args:
        images: which ones, by their number i.
        keep: of the way to them.
        progress: show a bar.

    Returns:
        Everything on the CPU.
    """
    batches = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    with image_bar(len(images), progress) as bar, drawing.denoiser.evaluating():
        return Samples.joined(list(generate_batches(drawing, batches, keep, bar.update)))


def generate_batches(
    drawing: ImageSampler,
    batches: Iterable[Sequence[int]],
    keep: Record = NOTHING,
    on_progress: Callable[[float], object] = lambda images: None,
) -> Iterator[Samples]:
    """For each batch of image numbers its `Samples`, on the CPU, made when it is asked for.

    What does not fit in memory is done by halves: that batch and those after it.

    Args:
        on_progress: is told after each step how many images' worth of work it was; less than 0 when that was in vain.
    """
    fitting = BatchLimit(drawing.device)
    for batch in batches:
        draw = lambda some: draw_batch(drawing, some, keep, on_progress)
        yield Samples.joined(fitting.in_parts(draw, batch))


def draw_batch(
    drawing: ImageSampler,
    batch: Sequence[int],
    keep: Record = NOTHING,
    on_progress: Callable[[float], object] = lambda images: None,
) -> Samples:
    """One batch, all at once."""
    times, noise, reported = drawing.settings.times(drawing.scheduler), drawing.noise(batch), 0.0
    x_T = noise.draw()
    kept = Samples(x_T, {0: keep.form(x_T)} if 0 in keep.states else {})

    def on_step(k: int, t: int, x: Tensor, x_0: Tensor) -> None:
        nonlocal reported
        if k + 1 in keep.states:
            kept.states[k + 1] = keep.form(x)
        if k + 1 in keep.predictions:
            kept.predictions[k + 1] = keep.form(x_0)
        share = len(batch) / (len(times) - 1)
        reported += share
        on_progress(share)

    try:
        x_0 = drawing.decode(x_T, times, noise.draw, on_step)
    except BaseException:
        on_progress(-reported)
        raise
    to_cpu = lambda tensors: {k: tensor.cpu() for k, tensor in tensors.items()}
    return Samples(x_0.cpu(), to_cpu(kept.states), to_cpu(kept.predictions))


class ImageBar(tqdm):
    """Counts images, in parts, as a batch of them takes its time."""

    def update(self, images: float = 1) -> bool | None:
        """Parts may add up to a little more than all, by rounding."""
        return super().update(min(images, self.total - self.n))


def image_bar(total: int, show: bool = True) -> ImageBar:
    """A bar for `total` images."""
    form = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total_fmt} images [{elapsed}<{remaining}]"
    return ImageBar(total=total, desc="sampling", disable=not show, dynamic_ncols=True, bar_format=form)


def frame_steps(steps: int, count: int) -> list[int]:
    """`count` numbers of steps from 0 to `steps`, denser at the end, where the image takes shape."""
    shares = [1 - (1 - i / (count - 1)) ** 1.5 for i in range(count)]
    return sorted({round(share * steps) for share in shares})
