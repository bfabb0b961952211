"""Between images, and around them: interpolation and variations by way of the noised image.

A depth t is a timestep of the code, 0 .. T-1: how far into the noise an image is taken before the
reverse process decodes it. The deeper, the less of the image is left; t = -1 is the image itself.
Interpolation is that of Ho et al. 2020, Section 4.4.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.pixels import to_model_range, to_uint8
from functions.sampling.generation import BatchLimit, ImageSampler, generate
from functions.support.pictures import save_strip

# A row has this many mixtures, from one end to the other.
MIXTURES = 9
# A row has this many variations, beside the image.
VARIATIONS = 8
# A source is the number of an image of the seed, or uint8 (H, W, 3) of an image file.
Source = int | np.ndarray


def interpolate_images(
    image_sampler: ImageSampler, ends: Tensor, t: int, weights: Tensor
) -> Tensor:
    """Noise two images to depth t, mix x_t on the straight line, and denoise: (L, C, H, W) images.

    The ends are (2, C, H, W) in [-1, 1], the (L,) weights those of the second: 0 and 1 give the
    two as they come back from depth t. Along a row nothing but the mixture changes.
    """
    # The purpose keeps this noise apart from that of image 0, from which an end may be sampled.
    noise = image_sampler.noise([0], "interpolation")
    # Both ends get the same noise, which leaves the mixture as noisy as they are.
    first, second = image_sampler.scheduler.q_sample(ends, t, noise.draw().expand_as(ends))
    w = weights.view(-1, 1, 1, 1)
    x_t = (1 - w) * first + w * second

    def shared():
        """Draw a step's noise, the same for all mixtures."""
        return noise.draw().expand_as(x_t)

    return image_sampler.denoise(x_t, t, shared)


def interpolate_seeds(
    image_sampler: ImageSampler, indices: Sequence[int], weights: Tensor
) -> Tensor:
    """Mix two images of the seed in their noise, x_T and each step's: (L, C, H, W) images.

    So (L,) weights 0 and 1 are images i and j as every script samples them, with any sampler.
    """
    noise = image_sampler.noise(indices)

    def between():
        """Draw the noise of both images, and mix it along great circles."""
        first, second = noise.draw()
        return slerp(first, second, weights)

    return image_sampler.denoise(between(), image_sampler.scheduler.timesteps - 1, between)


def variations(image_sampler: ImageSampler, x_0: Tensor, t: int, indices: Sequence[int]) -> Tensor:
    """Noise x_0 (C, H, W) to depth t with other noise each time, and denoise: (N, C, H, W) images.

    The noise of the steps differs, too. Each of the N depends on the seed and its number alone.
    """
    noise = image_sampler.noise(indices, "variation")
    x_t = image_sampler.scheduler.q_sample(x_0.expand(len(indices), *x_0.shape), t, noise.draw())
    return image_sampler.denoise(x_t, t, noise.draw)


def slerp(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """Go from a to b, both (C, H, W), along the great circle: (L, C, H, W) for (L,) weights.

    Between two draws of noise every point is such a draw again. On the straight line the middle
    has a standard deviation of 0.71, which no model has seen.
    """
    cosine = torch.dot(a.flatten(), b.flatten()) / (a.norm() * b.norm())
    # Where a = b the angle would be 0, and so would its sine, by which the mixture is divided.
    angle = torch.acos(cosine.clamp(-1, 1)).clamp(min=1e-4)
    w = weights.view(-1, 1, 1, 1)
    mixture = torch.sin((1 - w) * angle) * a + torch.sin(w * angle) * b
    return mixture / torch.sin(angle)


def mixtures(
    image_sampler: ImageSampler, sources: Sequence[Source], ends: Tensor, t: int, weights: Tensor
) -> Tensor:
    """Mix two sources at depth t, whose images are `ends`: (L, C, H, W) images.

    They are mixed in the paper's way (`interpolate_images`), or by `interpolate_seeds`.
    """
    # The noise of images of the seed is known, so at the depth of all timesteps it is mixed itself.
    of_seed = all(isinstance(source, int) for source in sources)
    if of_seed and t == image_sampler.scheduler.timesteps - 1:
        return interpolate_seeds(image_sampler, sources, weights)
    return interpolate_images(image_sampler, ends, t, weights)


def source_to_x_0(image_sampler: ImageSampler, source: Source) -> Tensor:
    """Return a source's image, which is sampled if it is a number: (C, H, W) in [-1, 1]."""
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

    A row of two sources has the mixtures between their images, a row of one has variations.
    """
    ends = torch.stack([source_to_x_0(image_sampler, source) for source in sources])
    times = [round(depth * image_sampler.scheduler.timesteps) - 1 for depth in depths]
    # A column is the weight of the second image, or the number of a variation.
    columns = range(VARIATIONS)
    mixing = len(sources) == 2
    if mixing:
        columns = torch.linspace(0, 1, MIXTURES, device=image_sampler.device)

    def part_of_row(t, part):
        if mixing:
            return mixtures(image_sampler, sources, ends, t, part)
        return variations(image_sampler, ends[0], t, part)

    limit = BatchLimit(image_sampler.device, image_sampler.batch_size)
    rows = []
    for t in tqdm(times, path.stem, unit="row"):
        parts = limit.in_parts(partial(part_of_row, t), columns)
        # The images of the sources stand at the ends of each row.
        row = torch.cat([ends[:1], *parts, ends[1:]])
        rows.append(to_uint8(row).cpu().numpy())

    titles = [f"{column:.3g}" for column in columns]
    first, *last = [f"image {source}" if isinstance(source, int) else "image" for source in sources]
    # The titles have the paper's t, which is 0 for an image.
    row_titles = [f"t = {t + 1}" for t in times]
    frames = np.stack(rows).swapaxes(0, 1)
    save_strip(frames, [first, *titles, *last], path, row_titles)
    print(f"wrote {path} ({image_sampler.options})")
