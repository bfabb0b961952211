"""Interpolate between two images, or sample variations of one, by noising and denoising them.

An image is noised to a depth t, a timestep in 0 .. T-1, and the reverse process then denoises it.
The larger t is, the less of the image remains; t = -1 is the image itself. Section 4.4 of Ho et al.
2020 interpolates in this way. `interpolate_exactly` instead mixes the x_T from which DDIM samples
the two images.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.decode import read_image
from data.pixels import to_model_range, to_uint8
from functions.samplers import ddim_invert, ddim_sample
from functions.sampling.files import edited_path
from functions.sampling.generation import ImageSampler, batches_of, generate
from functions.sampling.options import SamplerOptions
from functions.support.errors import UserError
from functions.support.pictures import save_strip

# A row of a figure has this many mixtures, from the first image to the second.
MIXTURE_COUNT = 9
# A row of a figure has this many variations, after the image itself.
VARIATION_COUNT = 8
# A source is the index of an image of the seed, or the pixels of an image file, uint8 (H, W, C).
Source = int | np.ndarray
# A row of a figure: it returns the images (B, C, H, W) of some columns.
Row = Callable[[Sequence[int] | Tensor], Tensor]


def interpolate_images(
    image_sampler: ImageSampler, ends: Tensor, t: int, weights: Tensor
) -> Tensor:
    """Noise two images to depth t, interpolate linearly, and denoise: (L, C, H, W) images.

    `ends` are (2, C, H, W) in [-1, 1]. `weights`, (L,), are the weights of the second end. For 0
    and 1 the results are the two ends, noised to depth t and denoised.
    """
    # An end may have been sampled from the noise of image 0. The purpose makes this noise differ
    # from that of image 0.
    noise = image_sampler.noise([0], "interpolation")
    # Both ends get the same noise, so the mixture is as noisy as the ends are.
    first, second = image_sampler.scheduler.q_sample(ends, t, noise.draw().expand_as(ends))
    w = weights.view(-1, 1, 1, 1)
    x_t = (1 - w) * first + w * second

    def shared_noise():
        """Draw a step's noise, the same for all mixtures."""
        return noise.draw().expand_as(x_t)

    return image_sampler.denoise(x_t, t, shared_noise)


def interpolate_seeds(
    image_sampler: ImageSampler, indices: Sequence[int], weights: Tensor
) -> Tensor:
    """Mix x_T and each step's noise of two images of the seed, and denoise: (L, C, H, W) images.

    `weights`, (L,), are the weights of the second image. For 0 and 1 the results are the two
    images, as every script samples them.
    """
    noise = image_sampler.noise(indices)

    def mixed_noise():
        """Draw the noise of both images, and mix it along great circles."""
        first, second = noise.draw()
        return slerp(first, second, weights)

    return image_sampler.denoise(mixed_noise(), image_sampler.scheduler.timesteps - 1, mixed_noise)


def variations(image_sampler: ImageSampler, x_0: Tensor, t: int, indices: Sequence[int]) -> Tensor:
    """Noise x_0 (C, H, W) to depth t with different noise, and denoise: (N, C, H, W) images.

    The noise of the steps also differs. For the same x_0 and t, each variation depends only on the
    seed and its index.
    """
    noise = image_sampler.noise(indices, "variation")
    x_t = image_sampler.scheduler.q_sample(x_0.expand(len(indices), *x_0.shape), t, noise.draw())
    return image_sampler.denoise(x_t, t, noise.draw)


def slerp(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """Interpolate from a to b, both (C, H, W), on the great circle: (L, C, H, W) for (L,) weights.

    A point on the great circle between two draws of standard normal noise has nearly the same
    distribution. The middle of the straight line would have a standard deviation of 0.71, and
    models are not trained on such noise.
    """
    cosine = torch.dot(a.flatten(), b.flatten()) / (a.norm() * b.norm())
    # If a = b the angle is 0. The mixture is divided by its sine, so the angle is clamped.
    angle = torch.acos(cosine.clamp(-1, 1)).clamp(min=1e-4)
    w = weights.view(-1, 1, 1, 1)
    mixture = torch.sin((1 - w) * angle) * a + torch.sin(w * angle) * b
    return mixture / torch.sin(angle)


def mixtures(
    image_sampler: ImageSampler, sources: Sequence[Source], ends: Tensor, t: int, weights: Tensor
) -> Tensor:
    """Mix two sources, whose images are `ends`, at depth t: (L, C, H, W) images."""
    # For images of the seed, the noise that they are sampled from is known. At the last timestep
    # this noise is mixed, instead of images with added noise.
    of_seed = all(isinstance(source, int) for source in sources)
    if of_seed and t == image_sampler.scheduler.timesteps - 1:
        return interpolate_seeds(image_sampler, sources, weights)
    return interpolate_images(image_sampler, ends, t, weights)


def exact_sampler(image_sampler: ImageSampler) -> ImageSampler:
    """Return the sampler for `edit.py interpolate --exact`: ddim with eta 0, without clipping.

    Raises UserError if the options ask for another sampler, for noise, or for a correction.
    """
    options = image_sampler.options
    if options.sampler == "dpm++" or options.eta or options.calibrate or options.guide:
        raise UserError(
            "--exact always samples by ddim with eta 0, without a calibration or a guide; "
            "give it no flags of the sampler but --steps and --spacing"
        )
    options = SamplerOptions("ddim", options.steps, options.spacing, eta=0.0, clip_x_0=False)
    return replace(image_sampler, options=options)


def invert(image_sampler: ImageSampler, x_0: Tensor) -> Tensor:
    """Return the x_T (1, C, H, W) from which the `exact_sampler` samples an image x_0 (C, H, W).

    Print by how much the sampled image differs from x_0.
    """
    x_T = ddim_invert(image_sampler.denoiser, x_0[None], image_sampler.times)
    again = ddim_sample(image_sampler.denoiser, x_T, image_sampler.times, clip_x_0=False)
    # From -1 to 1 there are 255 levels.
    error = 127.5 * (again - x_0).square().mean().sqrt()
    print(f"inverting and sampling again misses the image by {error:.2f} of 255 levels (RMS)")
    return x_T


def interpolate_exactly(image_sampler: ImageSampler, x_T: Tensor, weights: Tensor) -> Tensor:
    """Mix two x_T (2, C, H, W) along great circles, and sample: (L, C, H, W) images.

    `weights`, (L,), are the weights of the second x_T.
    """
    mixed = slerp(*x_T, weights)
    return ddim_sample(image_sampler.denoiser, mixed, image_sampler.times, clip_x_0=False)


def source_to_x_0(image_sampler: ImageSampler, source: Source) -> Tensor:
    """Return a source's image (C, H, W) in [-1, 1]; for an index the image is sampled."""
    if isinstance(source, int):
        images = generate(image_sampler, [source]).images
    else:
        images = to_model_range(torch.from_numpy(source)[None])
    return images[0].to(image_sampler.device)


def read_sources(args: argparse.Namespace, image_sampler: ImageSampler) -> list[Source]:
    """Return the sources that the command line names: indices or image files."""

    def read(text):
        return int(text) if text.isdecimal() else read_image(text, image_sampler.shape, args.fit)

    return [read(text) for text in args.images]


def save_mixtures(args: argparse.Namespace, image_sampler: ImageSampler, folder: Path) -> None:
    """Save a figure of mixtures of two images, as `edit.py interpolate` asks for it."""
    sources = read_sources(args, image_sampler)
    ends = torch.stack([source_to_x_0(image_sampler, source) for source in sources])
    weights = torch.linspace(0, 1, MIXTURE_COUNT, device=image_sampler.device)
    if args.exact:
        x_T = torch.cat([invert(image_sampler, end) for end in ends])
        kind = "interpolation-exact"
        rows = {"exact": partial(interpolate_exactly, image_sampler, x_T)}
    else:
        kind = "interpolation"
        rows = rows_of(args, image_sampler, partial(mixtures, image_sampler, sources, ends))
    path = edited_path(folder, kind, args.images, sources)
    save_rows(image_sampler, sources, ends, rows, weights, path)


def save_variations(args: argparse.Namespace, image_sampler: ImageSampler, folder: Path) -> None:
    """Save a figure of variations of an image, as `edit.py vary` asks for it."""
    sources = read_sources(args, image_sampler)
    x_0 = source_to_x_0(image_sampler, sources[0])
    rows = rows_of(args, image_sampler, partial(variations, image_sampler, x_0))
    path = edited_path(folder, "variations", args.images, sources)
    save_rows(image_sampler, sources, x_0[None], rows, range(VARIATION_COUNT), path)


def rows_of(
    args: argparse.Namespace, image_sampler: ImageSampler, edit: Callable[..., Tensor]
) -> dict[str, Row]:
    """Return {title: row} with a row of `edit(t, columns)` for each of --depths."""
    times = [round(depth * image_sampler.scheduler.timesteps) - 1 for depth in args.depths]
    # The titles give the paper's t, which is 0 for a clean image.
    return {f"t = {t + 1}": partial(edit, t) for t in times}


def save_rows(
    image_sampler: ImageSampler,
    sources: Sequence[Source],
    ends: Tensor,
    rows: dict[str, Row],
    columns: Sequence[int] | Tensor,
    path: Path,
) -> None:
    """Save a figure, whose rows begin and end with the images of the sources, which are `ends`.

    There is a column for each weight of the second image, or for each variation's index.
    """
    images = []
    for row in tqdm(rows.values(), path.stem, unit="row"):
        parts = [row(part) for part in batches_of(columns, image_sampler.batch_size)]
        images.append(to_uint8(torch.cat([ends[:1], *parts, ends[1:]])).cpu().numpy())

    titles = [f"{column:.3g}" for column in columns]
    first, *last = [f"image {source}" if isinstance(source, int) else "image" for source in sources]
    frames = np.stack(images).swapaxes(0, 1)
    save_strip(frames, [first, *titles, *last], path, list(rows))
    print(f"wrote {path} ({image_sampler.options})")
