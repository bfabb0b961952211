"""The verbs of edit.py: read the images that the command line names, edit them, save pictures."""

import argparse
import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.decode import read_image
from data.pixels import to_model_range, to_uint8
from functions.sampling.generation import ImageSampler, batches_of, generate
from functions.sampling.inpainting import inpaint_image, read_with_mask
from functions.sampling.interpolation import (
    interpolate_exactly,
    interpolate_images,
    invert,
    variations,
)
from functions.support.files import file_name
from functions.support.pictures import save_grid, save_image, save_strip

# A row of a figure has this many mixtures, from the first image to the second.
MIXTURE_COUNT = 9
# A row of a figure has this many variations, after the image itself.
VARIATION_COUNT = 8
# A row of a figure: it returns the images (B, C, H, W) of some columns.
Row = Callable[[Sequence[int] | Tensor], Tensor]


def save_mixtures(args: argparse.Namespace, image_sampler: ImageSampler, folder: Path) -> None:
    """Save a figure of mixtures of two images, with a row for each depth, or one for --exact."""
    ends = torch.stack([read_x_0(image_sampler, text, args.fit) for text in args.images])
    if args.exact:
        kind = "interpolation-exact"
        x_T = invert(image_sampler, ends)
        rows = {"exact": partial(interpolate_exactly, image_sampler, x_T)}
    else:
        kind = "interpolation"
        mix = partial(interpolate_images, image_sampler, ends)
        rows = rows_of(args.depths, image_sampler, mix)
    weights = torch.linspace(0, 1, MIXTURE_COUNT, device=image_sampler.device)
    path = edited_path(args, folder, kind, ends)
    save_rows(image_sampler, rows, weights, ends, path)


def save_variations(args: argparse.Namespace, image_sampler: ImageSampler, folder: Path) -> None:
    """Save a figure of variations of an image, with a row for each depth."""
    x_0 = read_x_0(image_sampler, args.images[0], args.fit)
    rows = rows_of(args.depths, image_sampler, partial(variations, image_sampler, x_0))
    path = edited_path(args, folder, "variations", x_0)
    save_rows(image_sampler, rows, range(VARIATION_COUNT), x_0[None], path)


def rows_of(
    depths: list[float], image_sampler: ImageSampler, edit: Callable[..., Tensor]
) -> dict[str, Row]:
    """Return {title: row} with a row of `edit(t, columns)` for each depth."""
    times = map(image_sampler.time_at, depths)
    # The titles give the paper's t, which is 0 for a clean image.
    return {f"t = {t + 1}": partial(edit, t) for t in times}


def save_inpaintings(args: argparse.Namespace, image_sampler: ImageSampler, folder: Path) -> None:
    """Save a grid of an image and its inpaintings. With --individual each also becomes a file."""
    image, mask = read_with_mask(args.images[0], args.mask, image_sampler.shape)
    # The same image with another mask is another source.
    source = torch.cat([torch.from_numpy(image), torch.from_numpy(mask)[..., None]], dim=-1)
    path = edited_path(args, folder, "inpainting", source)
    pictures = inpaint_image(image_sampler, image, mask, args.resample, args.n)
    save_grid(pictures, path, columns=min(len(pictures), 8))
    print(f"wrote {path}")
    if args.individual:
        # The first two pictures are the image and its known pixels. The names of the other files
        # are not just numbers, because a file with such a name is a sample from noise, which the
        # manifest describes.
        for i, picture in enumerate(pictures[2:]):
            save_image(picture, path.with_name(f"{path.stem}-{i:05d}.png"))


def read_x_0(image_sampler: ImageSampler, text: str, fit: bool) -> Tensor:
    """Return the image that the command line names: (C, H, W) in [-1, 1], on the sampler's device.

    `text` is the index of an image of the seed, which is sampled, or an image file. Raises
    UserError as `read_image` does.
    """
    if text.isdecimal():
        images = generate(image_sampler, [int(text)])
    else:
        pixels = read_image(text, image_sampler.shape, fit)
        images = to_model_range(torch.from_numpy(pixels)[None])
    return images[0].to(image_sampler.device)


def edited_path(args: argparse.Namespace, folder: Path, kind: str, images: Tensor) -> Path:
    """Create the folder, and return the path of a picture in it that is made of some images.

    The file's name has the start of each image's name on the command line, and a hash of all flags
    and of the images' values. So no picture of other images or settings is overwritten.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Each name is cut to 30 characters, so that a file name has room for two.
    stems = [file_name(Path(text).stem)[:30] for text in args.images]
    digest = hashlib.sha256(repr(sorted(vars(args).items())).encode(errors="surrogateescape"))
    digest.update(images.cpu().numpy().tobytes())
    return folder / f"{'-'.join([kind, *stems, digest.hexdigest()[:8]])}.png"


def save_rows(
    image_sampler: ImageSampler,
    rows: dict[str, Row],
    columns: Sequence[int] | Tensor,
    ends: Tensor,
    path: Path,
) -> None:
    """Save a figure with a row for each title in `rows`, and print its path.

    There is a column for each weight of the second image, or for each variation's index. Each row
    begins with the first of the images `ends` and, if there are two, ends with the second.
    """
    images = []
    for row in tqdm(rows.values(), path.stem, unit="row"):
        parts = [row(part) for part in batches_of(columns, image_sampler.batch_size)]
        images.append(to_uint8(torch.cat([ends[:1], *parts, ends[1:]])).cpu().numpy())

    first, *last = ["A", "B"][: len(ends)]
    titles = [first, *(f"{column:.3g}" for column in columns), *last]
    save_strip(np.stack(images, axis=1), titles, path, list(rows))
    print(f"wrote {path} ({image_sampler.options})")
