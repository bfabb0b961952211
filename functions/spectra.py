"""Spectra of images, and the bands of their frequencies, which are octaves."""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import one_hot

# With this norm the spectrum of standard normal noise also has variance 1.
spectrum = partial(torch.fft.fft2, norm="ortho")


def octaves(size: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the band of each coefficient in the spectrum of a square image: (size, size) int64.

    Band 0 is the mean. Band k has frequencies from 2^(k-1) to 2^k cycles per image. The last band
    also has all higher frequencies.
    """
    cycles = torch.fft.fftfreq(size, 1 / size, device=device)
    frequencies = torch.hypot(cycles[:, None], cycles)
    # The mean has frequency 0. It counts as half a cycle, which is one octave below band 1.
    octave = 1 + torch.log2(frequencies.clamp(min=0.5)).floor().long()
    return octave.clamp(max=max(1, size.bit_length() - 2))


def band_sums(values: Tensor) -> Tensor:
    """Sum values (..., H, W), one per coefficient of a spectrum, over bands: (..., bands) float64.

    The sums are on the CPU.
    """
    in_band = one_hot(octaves(values.shape[-1]).flatten()).double()
    return values.flatten(-2).cpu().double() @ in_band
