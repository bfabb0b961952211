"""Gaussian images whose variance is one number in each band of frequencies, and their ideal denoiser."""

import torch
from torch import Tensor

from functions.noise_scheduler import NoiseScheduler
from functions.sampling.calibration import octaves, spectrum

SIZE = 16
SCHEDULER = NoiseScheduler(1000)
OCTAVES = octaves(SIZE)  # 4 bands: mean, 1-2, 2-4, finest
VARIANCES = torch.tensor([30.0, 6.0, 1.0, 0.05])  # a power law, in steps
MU = torch.linspace(-0.5, 0.5, 3 * SIZE * SIZE).view(3, SIZE, SIZE)


def by_bands(images: Tensor, factors: Tensor) -> Tensor:
    """Multiply each band by a factor: (bands,), or (B, bands) for each image."""
    factors = factors[..., OCTAVES].view(-1, 1, SIZE, SIZE)
    return torch.fft.ifft2(factors * spectrum(images), norm="ortho").real


def draw_images(count: int, seed: int = 0) -> Tensor:
    noise = torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    return MU + by_bands(noise, VARIANCES.sqrt())


def ideal_eps(x_t: Tensor, t: Tensor, scheduler: NoiseScheduler = SCHEDULER) -> Tensor:
    """Wiener's filter: eps = sqrt(1 - a) (x_t - sqrt(a) mu) / (a s^2 + 1 - a) in each band."""
    a = scheduler.alphas_cumprod[t].float()[:, None]
    centred = x_t - a.sqrt().view(-1, 1, 1, 1) * MU
    return by_bands(centred, (1 - a).sqrt() / (a * VARIANCES + 1 - a))
