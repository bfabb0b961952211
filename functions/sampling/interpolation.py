"""Interpolate between two images, or sample variations of one, by noising and denoising them.

An image is noised to a timestep t, and the reverse process then denoises it. The larger t is, the
less of the image remains; t = -1 is the image itself. Section 4.4 of Ho et al. 2020 interpolates in
this way. `interpolate_exactly` instead mixes the x_T from which DDIM samples the two images.

Here t is one of the sampler's timesteps, and images are in [-1, 1], on the sampler's device.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from functions.samplers import ddim_invert, ddim_sample
from functions.sampling.generation import ImageSampler
from functions.sampling.options import SamplerOptions
from functions.support.errors import UserError


def interpolate_images(
    image_sampler: ImageSampler, ends: Tensor, t: int, weights: Tensor
) -> Tensor:
    """Noise two images to timestep t, interpolate linearly, and denoise: (L, C, H, W) images.

    `ends` are (2, C, H, W). `weights`, (L,), are the weights of the second end. For 0 and 1 the
    results are the two ends, noised to timestep t and denoised.
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


def variations(image_sampler: ImageSampler, x_0: Tensor, t: int, indices: Sequence[int]) -> Tensor:
    """Noise x_0 (C, H, W) to timestep t with different noise, and denoise: (N, C, H, W) images.

    The noise of the steps also differs. For the same x_0 and t, each variation depends only on the
    seed and its index.
    """
    noise = image_sampler.noise(indices, "variation")
    x_t = image_sampler.scheduler.q_sample(x_0.expand(len(indices), *x_0.shape), t, noise.draw())
    return image_sampler.denoise(x_t, t, noise.draw)


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
    """Return the x_T from which an `exact_sampler` samples images x_0, both (B, C, H, W).

    Print by how much each sampled image differs from x_0.
    """
    x_T = ddim_invert(image_sampler.denoiser, x_0, image_sampler.times)
    again = ddim_sample(image_sampler.denoiser, x_T, image_sampler.times, clip_x_0=False)
    for error in (again - x_0).square().mean(dim=(1, 2, 3)).sqrt():
        # From -1 to 1 there are 255 levels.
        levels = 127.5 * error
        print(f"inverting and sampling again misses the image by {levels:.2f} of 255 levels (RMS)")
    return x_T


def interpolate_exactly(image_sampler: ImageSampler, x_T: Tensor, weights: Tensor) -> Tensor:
    """Mix two x_T (2, C, H, W) along a great circle, and sample: (L, C, H, W) images.

    `weights`, (L,), are the weights of the second x_T.
    """
    mixed = slerp(*x_T, weights)
    return ddim_sample(image_sampler.denoiser, mixed, image_sampler.times, clip_x_0=False)


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
