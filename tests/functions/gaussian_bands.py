"""Gaussian images with one variance in each band of frequencies, and their ideal denoiser."""

import torch
from torch import Tensor

from functions.noise_scheduler import NoiseScheduler
from functions.spectra import octaves, spectrum

SIZE = 16
SCHEDULER = NoiseScheduler(1000)
# There are 4 bands: the mean, 1 to 2 and 2 to 4 cycles an image, and the finest.
OCTAVES = octaves(SIZE)
# From band to band the variances fall roughly as a power law, as they do in photographs.
VARIANCES = torch.tensor([30.0, 6.0, 1.0, 0.05])
# In the mean image each pixel of each channel has another value. They are large, so that a wrong
# mean is noticed also where x_t has little of it.
MU = torch.linspace(-4, 4, 3 * SIZE * SIZE).view(3, SIZE, SIZE)


def by_bands(images: Tensor, factors: Tensor) -> Tensor:
    """Multiply each band of the images by its factor.

    The factors are (bands,), or (B, bands) where each image has its own.
    """
    factors = factors[..., OCTAVES].view(-1, 1, SIZE, SIZE)
    return torch.fft.ifft2(factors * spectrum(images), norm="ortho").real


def draw_images(count: int, seed: int = 0) -> Tensor:
    """Draw images (count, 3, 16, 16) of this distribution."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 3, SIZE, SIZE, generator=generator)
    return MU + by_bands(noise, VARIANCES.sqrt())


def ideal_eps(x_t: Tensor, t: Tensor, scheduler: NoiseScheduler = SCHEDULER) -> Tensor:
    """Return E[eps | x_t], which is Wiener's filter.

    In a band of variance s^2 it is eps = sqrt(1 - a) (x_t - sqrt(a) mu) / (a s^2 + 1 - a).
    """
    a = scheduler.alphas_cumprod[t].float()[:, None]  # (B, 1)
    centred = x_t - a.sqrt().view(-1, 1, 1, 1) * MU
    gains = (1 - a).sqrt() / (a * VARIANCES + 1 - a)  # (B, bands)
    return by_bands(centred, gains)
