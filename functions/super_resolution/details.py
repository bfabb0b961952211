"""The details of an image, D x: what it shows beyond the same image at half the size.

    shrink      the linear map from S x S to S/2 x S/2 pixels of Lanczos, as Pillow computes it
    stretch     its pseudo-inverse: of all images that shrink to a small one, that of least norm
    D x         x - stretch(shrink(x))

D is linear and D D x = D x, so the details of x_t are those of x_0 with noise: D x_t = a D x_0 + s
D eps, where a = sqrt(alpha_bar) and s = sqrt(1 - alpha_bar). Divided by their standard deviation
STD in photos, details are data like others, for the samplers and the losses of any data. Their
log-SNR is that of their images plus LOG_SNR_SHIFT.

enlarging.py adds the part that the small image says.
"""

import math
from functools import cache

import torch
from torch import Tensor

# The standard deviation of the details of photos of faces, at 64 and at 128 px.
STD = 0.07
LOG_SNR_SHIFT = 2 * math.log(STD)


def shrinking(size: int) -> Tensor:
    """Return the matrix (S, 2S) with which Lanczos shrinks columns of 2S pixels: float64."""
    small, large = (torch.arange(n, dtype=torch.float64) + 0.5 for n in (size, 2 * size))
    distances = large / 2 - small[:, None]  # in small pixels
    weights = torch.sinc(distances) * torch.sinc(distances / 3) * (distances.abs() < 3)
    return weights / weights.sum(dim=1, keepdim=True)


@cache
def matrices(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the matrices that shrink columns of 2S pixels, (S, 2S), and stretch them, (2S, S)."""
    matrix = shrinking(size)
    return matrix.to(device, dtype), torch.linalg.pinv(matrix).to(device, dtype)


def shrink(images: Tensor) -> Tensor:
    """Return images (..., 2H, 2W) at half their size, (..., H, W)."""
    rows, columns = (matrices(n // 2, images.dtype, images.device)[0] for n in images.shape[-2:])
    return rows @ images @ columns.mT


def stretch(small: Tensor) -> Tensor:
    """Return the images (..., 2H, 2W) of least norm that shrink to `small` (..., H, W)."""
    rows, columns = (matrices(n, small.dtype, small.device)[1] for n in small.shape[-2:])
    return rows @ small @ columns.mT


def details(images: Tensor) -> Tensor:
    """Return D x of images x (..., 2H, 2W)."""
    return images - stretch(shrink(images))
