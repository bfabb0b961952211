"""Between images, and around them: interpolation and variations by way of the noised image (Ho et al. 2020).

A depth t is a timestep of the code, 0 .. T-1: how far into the noise an image is taken before the reverse process
decodes it. The deeper, the less of the image is left; t = -1 is the image itself.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from functions.sampling.generation import ImageSampler


def depth_of(share: float, timesteps: int) -> int:
    """The timestep that lies a share of the way to pure noise: 0 -> -1, 1 -> T - 1."""
    return round(share * timesteps) - 1


def interpolate_images(drawing: ImageSampler, ends: Tensor, t: int, weights: Tensor) -> Tensor:
    """Ho et al. 2020, Section 4.4: noise both images to depth t, mix x_t on the straight line, and decode.

    Both images get the same noise, which leaves the mixture as noisy as they are, and every step's noise is the same
    for all mixtures, so that along a row nothing but the mixture changes.

    Args:
        ends: (2, C, H, W) images in [-1, 1].
        weights: (L,) of the second image: 0 and 1 are the two images, as they come back from depth t.

    Returns:
        (L, C, H, W) images.
    """
    noise = drawing.noise([0], "interpolation")  # that of image 0 may be what one of the ends was drawn from
    first, second = noised(drawing, ends, t, noise.draw().expand_as(ends))
    shared = lambda: noise.draw().expand(len(weights), *drawing.shape)
    return decode(drawing, lerp(first, second, weights), t, shared)


def interpolate_seeds(drawing: ImageSampler, images: Sequence[int], weights: Tensor) -> Tensor:
    """From one drawn image to another through the noise that they come from, x_T and each step's, along great circles.

    So weights 0 and 1 are images i and j of the seed as every script draws them, with any sampler.

    Args:
        images: their numbers i and j.
        weights: (L,) of the second.

    Returns:
        (L, C, H, W) images.
    """
    noise = drawing.noise(images)
    between = lambda: slerp(*noise.draw(), weights)
    return decode(drawing, between(), drawing.scheduler.timesteps - 1, between)


def variations(drawing: ImageSampler, x_0: Tensor, t: int, numbers: Sequence[int]) -> Tensor:
    """Images like one image: noised to depth t with other noise each time, and decoded with other step noise.

    Args:
        x_0: (C, H, W) in [-1, 1].
        numbers: of the variations; each depends on the seed and its number alone.

    Returns:
        (len(numbers), C, H, W) images.
    """
    noise = drawing.noise(numbers, "variation")
    x_t = noised(drawing, x_0.expand(len(numbers), *x_0.shape), t, noise.draw())
    return decode(drawing, x_t, t, noise.draw)


def slerp(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """From a to b, both (C, H, W), along the great circle: (L, C, H, W) for the (L,) weights.

    Between two draws of noise every point is such a draw again; on the straight line the middle has a standard
    deviation of 0.71, which no model has seen.
    """
    angle = torch.acos((torch.dot(a.flatten(), b.flatten()) / (a.norm() * b.norm())).clamp(-1, 1))
    angle = angle.clamp(min=1e-4)  # where a = b the circle has no size
    weights = weights.view(-1, 1, 1, 1)
    return (torch.sin((1 - weights) * angle) * a + torch.sin(weights * angle) * b) / torch.sin(angle)


def lerp(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """From a to b, both (C, H, W), along the straight line: (L, C, H, W) for the (L,) weights."""
    weights = weights.view(-1, 1, 1, 1)
    return (1 - weights) * a + weights * b


def noised(drawing: ImageSampler, x_0: Tensor, t: int, noise: Tensor) -> Tensor:
    """(B, C, H, W) images at depth t."""
    return drawing.scheduler.q_sample(x_0, t, noise) if t >= 0 else x_0


def decode(drawing: ImageSampler, x_t: Tensor, t: int, noise: Callable[[], Tensor]) -> Tensor:
    """States (B, C, H, W) at depth t -> images, in the sampler's steps from there on."""
    return drawing.decode(x_t, drawing.settings.times(drawing.scheduler, t), noise) if t >= 0 else x_t
