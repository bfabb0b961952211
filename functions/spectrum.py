"""Images by spatial frequency: an image's mean, and bands of one octave each, in the orthonormal Fourier transform."""

import torch
from torch import Tensor


def spectrum(images: Tensor) -> Tensor:
    """(B, C, H, W) -> complex (B, C, H, W): the orthonormal transform, in which white noise has variance 1 too."""
    return torch.fft.fft2(images, norm="ortho")


def octaves(size: int, device: torch.device | str = "cpu") -> Tensor:
    """The band of each coefficient of images of size x size pixels: (H, W) int64.

    Band 0 is the mean; band k has frequencies from 2^(k-1) to 2^k cycles an image. The last has all that is finer.
    """
    cycles = torch.fft.fftfreq(size, 1 / size, device=device)
    octave = 1 + torch.log2(torch.hypot(cycles[:, None], cycles).clamp(min=0.5)).floor().long()
    return octave.clamp(max=max(1, size.bit_length() - 2))


def band_names(size: int) -> list[str]:
    """Names of the bands, such as "mean", "1-2", "2-4", "finest"; in cycles an image."""
    last = max(1, size.bit_length() - 2)
    return ["mean", *(f"{2 ** (k - 1)}-{2**k}" for k in range(1, last)), "finest"]


def band_means(values: Tensor) -> Tensor:
    """(B, C, H, W), a real number a coefficient -> (B, bands) float64: the mean over each band and all channels."""
    bands, values = octaves(values.shape[-1], values.device).flatten(), values.double().mean(dim=1).flatten(1)
    sums = values.new_zeros(len(values), int(bands.max()) + 1).index_add_(1, bands, values)
    return sums / torch.bincount(bands)
