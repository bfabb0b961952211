"""Between images, and around them: interpolation and variations by way of the noised image (Ho et al. 2020).

A depth t is a timestep of the code, 0 .. T-1: how far into the noise an image is taken before the reverse process
decodes it. The deeper, the less of the image is left; t = -1 is the image itself.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.pixels import to_model_range, to_uint8
from functions.sampling.generation import BatchLimit, ImageSampler, generate
from functions.support.pictures import save_strip

MIXTURES, VARIATIONS = 9, 8  # columns: from one end to the other, and beside the image
Source = int | np.ndarray  # the number of an image of the seed; or an image file's uint8 (H, W, 3)


def interpolate_images(
    image_sampler: ImageSampler, ends: Tensor, t: int, weights: Tensor
) -> Tensor:
    """Noise two images to depth t, mix x_t on the straight line, and decode (Ho et al. 2020, Section 4.4).

    Both get the same noise, which leaves the mixture as noisy as they are, and every step's noise is the same for all
    mixtures, so that along a row nothing but the mixture changes. The ends are (2, C, H, W) in [-1, 1], the (L,)
    weights those of the second: 0 and 1 give the two as they come back from depth t. Returns (L, C, H, W) images.
    """
    # That of image 0 may be what one of the ends was sampled from
    noise = image_sampler.noise([0], "interpolation")
    first, second = image_sampler.scheduler.q_sample(ends, t, noise.draw().expand_as(ends))
    w = weights.view(-1, 1, 1, 1)
    shared = lambda: noise.draw().expand(len(w), *image_sampler.shape)
    return image_sampler.decode((1 - w) * first + w * second, t, shared)


def interpolate_seeds(
    image_sampler: ImageSampler, images: Sequence[int], weights: Tensor
) -> Tensor:
    """Mix two images of the seed in their noise, x_T and each step's, along great circles: (L, C, H, W) images.

    So (L,) weights 0 and 1 are images i and j as every script samples them, with any sampler.
    """
    noise = image_sampler.noise(images)
    between = lambda: slerp(*noise.draw(), weights)
    return image_sampler.decode(between(), image_sampler.scheduler.timesteps - 1, between)


def variations(image_sampler: ImageSampler, x_0: Tensor, t: int, numbers: Sequence[int]) -> Tensor:
    """Noise x_0 (C, H, W) to depth t with other noise each time, and decode with other step noise: (N, C, H, W) images.

    Each of the N depends on the seed and its number alone.
    """
    noise = image_sampler.noise(numbers, "variation")
    x_t = image_sampler.scheduler.q_sample(x_0.expand(len(numbers), *x_0.shape), t, noise.draw())
    return image_sampler.decode(x_t, t, noise.draw)


def slerp(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """From a to b, both (C, H, W), along the great circle: (L, C, H, W) for the (L,) weights.

    Between two draws of noise every point is such a draw again; on the straight line the middle has a standard
    deviation of 0.71, which no model has seen.
    """
    angle = torch.acos((torch.dot(a.flatten(), b.flatten()) / (a.norm() * b.norm())).clamp(-1, 1))
    angle = angle.clamp(min=1e-4)  # where a = b the circle has no size
    weights = weights.view(-1, 1, 1, 1)
    return (torch.sin((1 - weights) * angle) * a + torch.sin(weights * angle) * b) / torch.sin(
        angle
    )


def mixtures(
    image_sampler: ImageSampler, sources: Sequence[Source], ends: Tensor, t: int, weights: Tensor
) -> Tensor:
    """Mix two sources, whose images are `ends`, as in the paper (`interpolate_images`): (L, C, H, W) images.

    But of two images of the seed the noise is known: at the depth of all timesteps that is mixed (`interpolate_seeds`).
    """
    if t == image_sampler.scheduler.timesteps - 1 and all(
        isinstance(source, int) for source in sources
    ):
        return interpolate_seeds(image_sampler, sources, weights)
    return interpolate_images(image_sampler, ends, t, weights)


def x_0_of(image_sampler: ImageSampler, source: Source) -> Tensor:
    """(C, H, W) in [-1, 1]: the image of that number, which is sampled, or a file's."""
    if isinstance(source, int):
        return generate(image_sampler, [source], 1).images[0].to(image_sampler.device)
    return to_model_range(torch.from_numpy(source)[None])[0].to(image_sampler.device)


def save_rows(
    image_sampler: ImageSampler,
    sources: Sequence[Source],
    depths: Sequence[float],
    batch_size: int,
    path: Path,
) -> None:
    """Save a row a depth, a fraction of all timesteps: two images and their mixtures between, or one and variations."""
    ends, mixing = (
        torch.stack([x_0_of(image_sampler, source) for source in sources]),
        len(sources) == 2,
    )
    all_t = [round(depth * image_sampler.scheduler.timesteps) - 1 for depth in depths]
    weights = torch.linspace(0, 1, MIXTURES, device=image_sampler.device)
    titles = (
        [f"{weight:.3g}" for weight in weights.tolist()]
        if mixing
        else [*map(str, range(VARIATIONS))]
    )

    def columns(some: range, t: int) -> Tensor:
        if mixing:
            return mixtures(image_sampler, sources, ends, t, weights[list(some)])
        return variations(image_sampler, ends[0], t, some)

    limit, rows = BatchLimit(image_sampler.device, batch_size), []
    for t in tqdm(all_t, path.stem, unit="row"):
        row = limit.in_parts(lambda some, t=t: to_uint8(columns(some, t)).cpu(), range(len(titles)))
        rows.append(torch.cat(row).numpy())
    first, *last = [
        np.repeat(image[None], len(rows), axis=0) for image in to_uint8(ends).cpu().numpy()
    ]
    first_title, *last_title = [
        f"image {source}" if isinstance(source, int) else "image" for source in sources
    ]
    row_titles = [f"t = {t + 1}" for t in all_t]  # the paper's t, which is 0 for an image
    save_strip(
        [first, *np.stack(rows).swapaxes(0, 1), *last],
        [first_title, *titles, *last_title],
        path,
        row_titles,
    )
    print(f"wrote {path} ({image_sampler.options})")
