"""Interpolate between two images, or sample variations of one, by noising and denoising them.

An image is noised to t, one of the sampler's timesteps, and denoised (Ho et al. 2020, Section 4.4).
t = -1 is the image itself. Images are in [-1, 1], on the sampler's device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from functions.samplers import ddim_invert, ddim_sample
from functions.sampling.generation import ImageSampler, step_bar


def interpolate_images(
    image_sampler: ImageSampler, ends: Tensor, t: int, weights: Tensor
) -> Tensor:
    """Noise two images to timestep t, interpolate linearly, and denoise: (L, C, H, W) images.

    `ends` are (2, C, H, W). `weights`, (L,), are the weights of the second end.
    """
    # An end may have been sampled from the noise of image 0. The purpose makes this noise differ
    # from that of image 0.
    noise = image_sampler.noise([0], "interpolation")
    # Both ends get the same noise, so the mixture is as noisy as the ends are.
    first, second = image_sampler.scheduler.q_sample(ends, t, noise())
    w = weights.view(-1, 1, 1, 1)
    x_t = (1 - w) * first + w * second
    # The noise of a step is the same for all mixtures, too.
    return image_sampler.denoise(x_t, t, lambda: noise().expand_as(x_t))


def variations(image_sampler: ImageSampler, x_0: Tensor, t: int, indices: Sequence[int]) -> Tensor:
    """Noise x_0 (C, H, W) to timestep t with different noise, and denoise: (N, C, H, W) images.

    For the same x_0 and t, each variation depends only on the seed and its index.
    """
    noise = image_sampler.noise(indices, "variation")
    x_t = image_sampler.scheduler.q_sample(x_0, t, noise())
    return image_sampler.denoise(x_t, t, noise)


def interpolate_exactly(
    image_sampler: ImageSampler, ends: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Mix the noise of two images, and sample by DDIM: the noise and the images, (L, C, H, W) each.

    `ends` are (2, C, H, W), or (1, C, H, W) for an image that is mixed with itself. `weights`,
    (L,), are the weights of the second end.
    """
    denoiser = image_sampler.denoiser
    times = image_sampler.times
    with step_bar(image_sampler, len(ends) + len(weights), True) as bar:

        def on_step(k, t, x, x_0):
            bar.update(len(x))

        x_T = ddim_invert(denoiser, ends, times, on_step=on_step)
        noise = slerp(x_T[0], x_T[-1], weights)
        images = [
            ddim_sample(denoiser, batch, times, clip_x_0=False, on_step=on_step)
            for batch in noise.split(image_sampler.batch_size)
        ]
    return noise, torch.cat(images)


def slerp(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """Interpolate from a to b, both (C, H, W), along a great circle: (L, C, H, W) for (L,) weights.

    A mixture of two draws of standard normal noise is then nearly standard normal; the middle of
    the straight line would have a standard deviation of 0.71.
    """
    cosine = torch.cosine_similarity(a.flatten(), b.flatten(), dim=0)
    # For a = b the angle would be 0, and the mixture is divided by its sine.
    angle = torch.acos(cosine.clamp(max=1 - 1e-6))
    w = weights.view(-1, 1, 1, 1)
    mixture = torch.sin((1 - w) * angle) * a + torch.sin(w * angle) * b
    return mixture / torch.sin(angle)
