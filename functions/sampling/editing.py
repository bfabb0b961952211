"""Edit images: mix two, vary one, inpaint it, enlarge it; and the flags of the verbs of edit.py.

An image is noised to t, one of the sampler's timesteps, and denoised (Ho et al. 2020, Section 4.4).
t = -1 is the image itself. Images are in [-1, 1], on the models' device.

Inpainting resamples the masked pixels so that they match the rest (RePaint, Lugmayr et al. 2022,
arXiv:2201.09865). After each step the known pixels, noised to the new level, replace those outside
the mask. A single pass leaves seams, because the masked pixels are computed before the noise of the
known ones is drawn. So each step is repeated: the state is noised back to the level before it.
RePaint's jumps back have length 10, for 250 steps.

All of this happens at the size of the model. What the enlargers then draw is shown.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import ImageOps
from torch import Tensor
from tqdm import tqdm

from data.decode import to_pixels
from data.pictures import fit_image, fit_mask, open_image_file
from data.pixels import to_model_range, to_uint8
from functions.sampling.generation import (
    Noise,
    Pipeline,
    enlarge_images,
    generate,
    given,
    take_steps,
)
from functions.sampling.inpainting import Keeping, Known
from functions.sampling.models import ENLARGES, opened
from functions.sampling.samples_folder import (
    manifest_of,
    new_samples_folder,
    open_folder,
)
from functions.sampling.settings import OF_SAMPLER, SamplingConfig, SamplingFlags
from functions.sampling.strips import save_strip
from functions.saved.run_folder import DeviceFlags, new_folder
from functions.super_resolution.enlarging import enlarge
from functions.support.device import DTYPES, choose_device
from functions.support.errors import UserError
from functions.support.pictures import save_grid, save_image
from functions.support.processes import batches_of
from functions.support.random_numbers import image_noise
from functions.support.settings import require, setting

# A row of a figure has mixtures with these weights of the second image, between both.
WEIGHTS = torch.linspace(0, 1, 9)
MIXTURE_TITLES = ["A", *(f"{weight:.3g}" for weight in WEIGHTS), "B"]
# A row of a figure has this many variations, after the image itself.
VARIATION_COUNT = 8
# What inpainting begins with, whatever a recipe says: all the noise that steps can add
INPAINTING = {"sampler": "ddpm", "steps": 50, **OF_SAMPLER}
# Grey that fills the mask in the picture of the known pixels.
GREY = 128


@dataclass(frozen=True, kw_only=True)
class EditFlags(SamplingFlags):
    """The flags of all verbs but enlarge."""

    # The words before the flags
    images: tuple[str, ...] = setting(no_flag=True)
    run: Path = setting(no_flag=True)
    # The folder for the written files. None: a new folder in samples/ of the run, or here for a
    # recipe.
    out: Path | None = None


@dataclass(frozen=True, kw_only=True)
class DepthFlags(EditFlags):
    """The flags of interpolate and vary."""

    # How far the images are noised, as fractions of all timesteps.
    depths: tuple[float, ...] = setting((0.25, 0.5, 0.75, 1.0), at_most=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        require("depths", self.depths, self.depths, "a list of one or more")


@dataclass(frozen=True, kw_only=True)
class InpaintFlags(EditFlags):
    """The flags of inpaint."""

    # An image of equal size, white in the part to inpaint. None: the transparent part of A is
    # inpainted.
    mask: str | None = None
    # How many times each step is done.
    resample: int = 10
    # How many inpaintings to sample.
    n: int = 36


@dataclass(frozen=True, kw_only=True)
class EnlargeFlags(DeviceFlags):
    """The flags of enlarge."""

    # The words before the flags
    image: str = setting(no_flag=True)
    model: str = setting(no_flag=True)
    # How many times the size is doubled.
    times: int = setting(1, at_most=4)
    # The seed of the details' noise.
    seed: int = setting(0, at_least=-inf)
    # The folder for the written file. None: a new folder in samples/.
    out: Path | None = None
    # The number format that the network computes in. auto is that of the model's training, or
    # float32 if the device has no instructions for it.
    precision: Literal["auto", *DTYPES] = "auto"


def check_edit(verb: str, config: SamplingConfig) -> None:
    """Raise UserError for settings that a verb cannot use."""
    if len(config.label) > 1:
        raise UserError("an edit has one --label")
    full = config.sampler == "ddpm" or (config.sampler, config.eta) == ("ddim", 1.0)
    if verb == "inpaint" and not (full and config.temperature == 1):
        raise UserError(
            "inpaint needs --sampler ddpm, or ddim --eta 1, with --temperature 1: others add too "
            "little noise, or depend on earlier steps, which inpainting undoes"
        )


def time_at(pipeline: Pipeline, depth: float) -> int:
    """Return the sampler's timestep nearest to `depth`, from 0 (the image) to 1 (noise)."""
    return min(pipeline.times, key=lambda t: abs(t + 1 - depth * pipeline.scheduler.timesteps))


def denoise(pipeline: Pipeline, x_t: Tensor, t: int, noise: Noise) -> Tensor:
    """Denoise states (B, C, H, W) at t, one of the sampler's timesteps, to images."""
    times = [s for s in pipeline.times if s <= t]
    return take_steps(pipeline, given(pipeline, [0]), x_t, times, noise)


def interpolate_images(pipeline: Pipeline, ends: Tensor, t: int, weights: Tensor) -> Tensor:
    """Noise two images to timestep t, interpolate linearly, denoise and enlarge: (L, C, H, W).

    `ends` are (2, C, H, W). `weights`, (L,), are the weights of the second end. The images are on
    the CPU.
    """
    # An end may have been sampled from the noise of image 0. The purpose makes this noise differ
    # from that of image 0.
    noise = pipeline.noise([0], "interpolation")
    # Both ends get the same noise, so the mixture is as noisy as the ends are.
    first, second = pipeline.scheduler.q_sample(ends, t, noise())
    w = weights.view(-1, 1, 1, 1)
    x_t = (1 - w) * first + w * second
    # The noise of a step, and that of the details, is the same for all mixtures, too.
    images = denoise(pipeline, x_t, t, noise)
    return enlarge_images(pipeline, images, [0], "interpolation details")


def variations(pipeline: Pipeline, x_0: Tensor, t: int, indices: Sequence[int]) -> Tensor:
    """Noise x_0 (C, H, W) to t with different noise, denoise and enlarge: (N, C, H, W).

    For the same x_0 and t, each variation depends only on the seed and its index. The images are on
    the CPU.
    """
    noise = pipeline.noise(indices, "variation")
    x_t = pipeline.scheduler.q_sample(x_0, t, noise())
    images = denoise(pipeline, x_t, t, noise)
    return enlarge_images(pipeline, images, indices, "variation details")


def inpaint(pipeline: Pipeline, known: Known, resample: int, indices: Sequence[int]) -> Tensor:
    """Inpaint by RePaint's Algorithm 1, with jumps of length 1: each step is done `resample` times.

    The known image is in [-1, 1], on the models' device, for its size (C, H, W), and its mask is
    true where pixels are sampled. Returns one result for each index: (B, C, H, W). Steps must add
    all the noise that they can, as those of ddpm do.
    """
    x_0, mask = known.at_size()
    # Of an image that is larger, pixels at the edge of the mask are known in part.
    keeping = Keeping(given(pipeline, [0]), known)
    scheduler = pipeline.scheduler
    # A step leads from timestep t to s.
    steps = list(pairwise(pipeline.times))
    noise = pipeline.noise(indices, "inpainting")
    x = noise()
    for t, s in tqdm(steps, "inpainting", unit="step"):
        # The last step leads to x_0, and is not repeated.
        for repeat in range(resample if s >= 0 else 1):
            # In all repeats but the first, q(x_t | x_s) takes the state back from s to t.
            if repeat > 0:
                beta = scheduler.step_beta(t, s)
                x = (1 - beta) ** 0.5 * x + beta**0.5 * noise()
            unknown = take_steps(pipeline, keeping, x, [t, s], noise)
            # At s = -1, the clean image, this is x_0 itself.
            x = torch.where(mask, unknown, scheduler.q_sample(x_0, s, noise()))
    return x


def read_with_mask(
    path: str, mask_path: str | None, shape: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Read an image to be inpainted and its mask -> uint8 (S, S, C), and bool (S, S).

    The mask is true where its file is white or, without a file, where the image is transparent.
    Both are cropped and resized to `shape`, (C, S, S). Raises UserError for an unreadable image, a
    mask of another size than its image, or a mask that is true or false everywhere.
    """
    image = open_image_file(path)
    if mask_path:
        mask_image = open_image_file(mask_path)
    else:
        mask_image = ImageOps.invert(image.convert("RGBA").getchannel("A"))

    if mask_image.size != image.size:
        raise UserError(
            f"{mask_path} has {mask_image.width}x{mask_image.height} pixels, its image "
            f"{image.width}x{image.height}; a mask must be as large as its image"
        )

    mask = fit_mask(to_pixels(mask_image, 1)[..., 0] >= 128, shape[-1])
    if mask.all() or not mask.any():
        raise UserError(
            f"{mask_path or path}: everything or nothing would be inpainted in the middle square "
            "of the image, to which it is cropped; give a --mask that is partly white there, or "
            "erase a part there"
        )
    return fit_image(image, shape), mask


def inpaint_image(
    pipeline: Pipeline, image: np.ndarray, mask: np.ndarray, resample: int, count: int
) -> np.ndarray:
    """Inpaint a uint8 image (H, W, C) `count` times where the mask, bool (H, W), is true.

    H and W are those of enlarged samples. What is known of the image is kept at every size. Returns
    the image, its known pixels on grey, and the results: (2 + count, H, W, C).
    """
    device = pipeline.models.device
    x_0 = to_model_range(image[None])[0].to(device)
    sizes = [Known(x_0, torch.from_numpy(mask).to(device))]
    for _ in pipeline.models.enlargers:
        sizes.insert(0, sizes[0].halved())
    smallest, *larger = sizes
    keep = [known.put_into for known in larger]
    results = []
    for indices in batches_of(range(count), pipeline.batch_size):
        images = inpaint(pipeline, smallest, resample, indices)
        images = enlarge_images(pipeline, images, indices, "inpainting details", keep)
        results.append(to_uint8(images))
    pixels_left = np.where(mask[..., None], np.uint8(GREY), image)
    return np.concatenate([[image, pixels_left], *results])


def save_mixtures(flags: DepthFlags, pipeline: Pipeline) -> None:
    """Save a figure of mixtures of two images, with a row for each depth."""
    (first, shown_first), (second, shown_second) = (
        read_image(pipeline, text) for text in flags.images
    )
    ends = torch.stack([first, second])
    path = edited_path(flags, pipeline, "interpolation")
    batches = WEIGHTS.to(ends.device).split(pipeline.batch_size)
    rows = {}
    for t in times_of(flags, pipeline):
        mixtures = [interpolate_images(pipeline, ends, t, batch) for batch in batches]
        rows[t] = [shown_first, *mixtures, shown_second]
    save_rows(rows, MIXTURE_TITLES, path)


def save_variations(flags: DepthFlags, pipeline: Pipeline) -> None:
    """Save a figure of an image and its variations, with a row for each depth."""
    x_0, shown = read_image(pipeline, flags.images[0])
    path = edited_path(flags, pipeline, "variations")
    batches = batches_of(range(VARIATION_COUNT), pipeline.batch_size)
    rows = {}
    for t in times_of(flags, pipeline):
        rows[t] = [shown, *(variations(pipeline, x_0, t, batch) for batch in batches)]
    save_rows(rows, ["A", *map(str, range(VARIATION_COUNT))], path)


def times_of(flags: DepthFlags, pipeline: Pipeline) -> Iterable[int]:
    """Return the sampler's timesteps nearest to --depths, each once, with a progress bar."""
    times = dict.fromkeys(time_at(pipeline, depth) for depth in flags.depths)
    return tqdm(times, "editing", unit="row")


def save_inpaintings(flags: InpaintFlags, pipeline: Pipeline) -> None:
    """Save a grid of an image, its known pixels, and its inpaintings."""
    shape = pipeline.models.enlarged_shape
    image, mask = read_with_mask(flags.images[0], flags.mask, shape)
    path = edited_path(flags, pipeline, "inpainting")
    pictures = inpaint_image(pipeline, image, mask, flags.resample, flags.n)
    save_grid(pictures, path, columns=min(len(pictures), 8))
    print(f"wrote {path}")


@torch.no_grad()
def save_enlarged(flags: EnlargeFlags) -> None:
    """Double the size of a picture, H and W of any number of pixels, some times, and save it."""
    path = Path(flags.image)
    device = choose_device(flags.device)
    model = opened(Path(flags.model), device, flags.precision, ENLARGES)
    pixels = to_pixels(open_image_file(path), model.shape[0])
    image = to_model_range(pixels[None]).to(device)
    for k in range(flags.times):
        _, channels, height, width = image.shape
        shape = channels, 2 * height, 2 * width
        noise = image_noise(flags.seed, [0], shape, device, f"details of a picture {k + 1}")
        print(f"enlarging {width} x {height} pixels", flush=True)
        image = enlarge(model.denoiser, image, noise)
    folder = flags.out or new_folder(Path("samples"), "enlarged")
    folder.mkdir(parents=True, exist_ok=True)
    path = free_path(folder, path.stem)
    save_image(to_uint8(image)[0], path)
    print(f"wrote {path}")


def read_image(pipeline: Pipeline, text: str) -> tuple[Tensor, Tensor]:
    """Return the image that the command line names, at the model's size and as it is shown.

    The first is (C, H, W) in [-1, 1], on the models' device, and the second is (1, C, H, W) on
    the CPU, enlarged. `text` is the index of an image of the seed, which is sampled as sample.py
    does, or an image file. Raises UserError for an unreadable file.
    """
    if text.isdecimal():
        indices = [int(text)]
        purpose = "details"
        alone = replace(pipeline, models=replace(pipeline.models, enlargers=()))
        small = generate(alone, indices)
    else:
        hint = "; give an image file, or the index (0, 1, ...) of an image that the seed generates"
        pixels = fit_image(open_image_file(text, hint), pipeline.models.shape)
        indices = [0]
        purpose = "file details"
        small = to_model_range(pixels[None])
    small = small.to(pipeline.models.device)
    return small[0], enlarge_images(pipeline, small, indices, purpose)


def edited_path(flags: EditFlags, pipeline: Pipeline, kind: str) -> Path:
    """Return a free path for a picture of the images, in --out or a new folder with a manifest."""
    folder = flags.out
    if not folder:
        folder = new_samples_folder(flags.run, pipeline.models.saved)
        open_folder(folder, manifest_of(pipeline))
    folder.mkdir(parents=True, exist_ok=True)
    # A file name has at most 255 bytes, and a letter up to four.
    return free_path(folder, "-".join([kind, *(Path(text).stem[:25] for text in flags.images)]))


def free_path(folder: Path, name: str) -> Path:
    """Return the path of a PNG of this name, or of NAME-2, ..., that does not exist."""
    path = folder / f"{name}.png"
    number = 1
    while path.exists():
        number += 1
        path = folder / f"{name}-{number}.png"
    return path


def save_rows(rows: dict[int, list[Tensor]], titles: list[str], path: Path) -> None:
    """Save a figure with a row of images, (B, C, H, W) each, for a timestep, and print its path."""
    images = np.stack([to_uint8(torch.cat(row)) for row in rows.values()], axis=1)
    # The titles give the paper's t, which is 0 for a clean image.
    row_titles = [f"noised to\nt = {t + 1}" for t in rows]
    save_strip(dict(zip(titles, images, strict=True)), path, row_titles)
    print(f"wrote {path}")
