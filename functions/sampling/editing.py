"""The verbs of edit.py: read the images that the command line names, edit them, save a picture."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.batches import batches_of
from data.decode import fit_image, open_image_file
from data.pixels import to_model_range, to_uint8
from functions.sampling.generation import ImageSampler, generate
from functions.sampling.inpainting import inpaint_image, read_with_mask, require_full_noise
from functions.sampling.interpolation import interpolate_exactly, interpolate_images, variations
from functions.support.files import sha256
from functions.support.pictures import save_grid, save_strip

# A row of a figure has this many mixtures, from the first image to the second.
MIXTURE_COUNT = 9
# A row of a figure has this many variations, after the image itself.
VARIATION_COUNT = 8


def save_mixtures(args: Namespace, image_sampler: ImageSampler, folder: Path) -> None:
    """Save a figure of mixtures of two images: a row for each depth, or with --exact of noises."""
    ends = torch.stack([read_x_0(image_sampler, text) for text in args.images])
    path = edited_path(args, folder, "interpolation")
    weights = torch.linspace(0, 1, MIXTURE_COUNT, device=image_sampler.device)
    rows = {}
    if args.exact:
        _, mixtures = interpolate_exactly(image_sampler, ends, weights)
        print_errors(mixtures[[0, -1]] - ends)
        rows[image_sampler.times[0]] = torch.cat([ends[:1], mixtures, ends[1:]])
    else:
        for t in tqdm(times_of(image_sampler, args.depths), "interpolation", unit="row"):
            batches = weights.split(image_sampler.batch_size)
            mixtures = [interpolate_images(image_sampler, ends, t, batch) for batch in batches]
            rows[t] = torch.cat([ends[:1], *mixtures, ends[1:]])
    save_rows(rows, ["A", *(f"{weight:.3g}" for weight in weights), "B"], path)


def save_inversion(args: Namespace, image_sampler: ImageSampler, folder: Path) -> None:
    """Save a figure of an image, its noise, and what is sampled from this noise."""
    x_0 = read_x_0(image_sampler, args.images[0])[None]
    path = edited_path(args, folder, "inversion")
    noise, again = interpolate_exactly(image_sampler, x_0, x_0.new_zeros(1))
    print_errors(again - x_0)
    row = torch.cat([x_0, noise, again])
    save_rows({image_sampler.times[0]: row}, ["A", "its noise", "its way back"], path)


def print_errors(differences: Tensor) -> None:
    """Print by how much A and B, (B, C, H, W), change on the way to their noise and back."""
    errors = differences.square().mean((1, 2, 3)).sqrt()
    for name, error in zip("AB", errors, strict=False):
        # From -1 to 1 there are 255 levels.
        print(f"{name} comes back {127.5 * error:.2f} of 255 levels off (RMS)")


def save_variations(args: Namespace, image_sampler: ImageSampler, folder: Path) -> None:
    """Save a figure of an image and its variations, with a row for each depth."""
    x_0 = read_x_0(image_sampler, args.images[0])
    path = edited_path(args, folder, "variations")
    rows = {}
    for t in tqdm(times_of(image_sampler, args.depths), "variations", unit="row"):
        batches = batches_of(range(VARIATION_COUNT), image_sampler.batch_size)
        results = [variations(image_sampler, x_0, t, indices) for indices in batches]
        rows[t] = torch.cat([x_0[None], *results])
    save_rows(rows, ["A", *map(str, range(VARIATION_COUNT))], path)


def times_of(image_sampler: ImageSampler, depths: list[float]) -> list[int]:
    """Return the sampler's timesteps nearest to these depths, each once."""
    return list(dict.fromkeys(map(image_sampler.time_at, depths)))


def save_inpaintings(args: Namespace, image_sampler: ImageSampler, folder: Path) -> None:
    """Save a grid of an image, its known pixels, and its inpaintings."""
    require_full_noise(image_sampler.options)
    image, mask = read_with_mask(args.images[0], args.mask, image_sampler.shape)
    path = edited_path(args, folder, "inpainting")
    pictures = inpaint_image(image_sampler, image, mask, args.resample, args.n)
    save_grid(pictures, path, columns=min(len(pictures), 8))
    print(f"wrote {path}")


def read_x_0(image_sampler: ImageSampler, text: str) -> Tensor:
    """Return the image that the command line names: (C, H, W) in [-1, 1], on the sampler's device.

    `text` is the index of an image of the seed, which is sampled, or an image file. Raises
    UserError for an unreadable file.
    """
    if text.isdecimal():
        images = generate(image_sampler, [int(text)])
    else:
        hint = "; give an image file, or the index (0, 1, ...) of an image that the seed generates"
        pixels = fit_image(open_image_file(text, hint), image_sampler.shape)
        images = to_model_range(pixels[None])
    return images[0].to(image_sampler.device)


def edited_path(args: Namespace, folder: Path, kind: str) -> Path:
    """Create the folder, and return the picture's path, which only the same command overwrites."""
    folder.mkdir(parents=True, exist_ok=True)
    # A file name has at most 255 bytes, and a letter up to four.
    stems = [Path(text).stem[:25] for text in args.images]
    digest = sha256(ascii(sorted(vars(args).items())))
    return folder / f"{'-'.join([kind, *stems, digest[:8]])}.png"


def save_rows(rows: dict[int, Tensor], titles: list[str], path: Path) -> None:
    """Save a figure with a row of images (B, C, H, W) for each timestep, and print its path."""
    images = np.stack([to_uint8(row) for row in rows.values()], axis=1)
    # The titles give the paper's t, which is 0 for a clean image.
    row_titles = [f"t = {t + 1}" for t in rows]
    save_strip(dict(zip(titles, images, strict=True)), path, row_titles)
    print(f"wrote {path}")


VERBS = {
    "interpolate": save_mixtures,
    "invert": save_inversion,
    "vary": save_variations,
    "inpaint": save_inpaintings,
}
