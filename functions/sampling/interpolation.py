"""Interpolate between two images, or sample variations of one, by noising and denoising them.

An image is noised to a depth t, a timestep in 0 .. T-1, and the reverse process then denoises it.
The larger t is, the less of the image remains; t = -1 is the image itself. Section 4.4 of Ho et al.
2020 interpolates in this way.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.pixels import to_model_range, to_uint8
from functions.sampling.generation import ImageSampler, batches_of, generate
from functions.support.pictures import save_strip

# A row of a figure has this many mixtures, from the first image to the second.
MIXTURE_COUNT = 9
# A row of a figure has this many variations, after the image itself.
VARIATION_COUNT = 8
# A source is the index of an image of the seed, or the pixels of an image file, uint8 (H, W, C).
Source = int | np.ndarray


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


def source_to_x_0(image_sampler: ImageSampler, source: Source) -> Tensor:
    """Return a source's image (C, H, W) in [-1, 1]; for an index the image is sampled."""
    if isinstance(source, int):
        images = generate(image_sampler, [source]).images
    else:
        images = to_model_range(torch.from_numpy(source)[None])
    return images[0].to(image_sampler.device)


def save_rows(
    image_sampler: ImageSampler,
    sources: Sequence[Source],
    depths: Sequence[float],
    path: Path,
) -> None:
    """Save a figure with a row for each depth, a fraction of all timesteps.

    With two sources a row has mixtures of their images. With one source it has variations.
    """
    ends = torch.stack([source_to_x_0(image_sampler, source) for source in sources])
    times = [round(depth * image_sampler.scheduler.timesteps) - 1 for depth in depths]
    # There is a column for each weight of the second image, or for each variation's index.
    columns = range(VARIATION_COUNT)
    mixing = len(sources) == 2
    if mixing:
        columns = torch.linspace(0, 1, MIXTURE_COUNT, device=image_sampler.device)

    def part_of_row(t, part):
        if mixing:
            return mixtures(image_sampler, sources, ends, t, part)
        return variations(image_sampler, ends[0], t, part)

    rows = []
    for t in tqdm(times, path.stem, unit="row"):
        parts = [part_of_row(t, part) for part in batches_of(columns, image_sampler.batch_size)]
        # A row begins and ends with the images of the sources.
        row = torch.cat([ends[:1], *parts, ends[1:]])
        rows.append(to_uint8(row).cpu().numpy())

    titles = [f"{column:.3g}" for column in columns]
    first, *last = [f"image {source}" if isinstance(source, int) else "image" for source in sources]
    # The titles give the paper's t, which is 0 for a clean image.
    row_titles = [f"t = {t + 1}" for t in times]
    frames = np.stack(rows).swapaxes(0, 1)
    save_strip(frames, [first, *titles, *last], path, row_titles)
    print(f"wrote {path} ({image_sampler.options})")
