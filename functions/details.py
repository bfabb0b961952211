"""The details of an image, D x: what it shows beyond the same image at half the size.

    shrink      the linear map from S x S to S/2 x S/2 pixels of Lanczos, as Pillow computes it
    stretch     its pseudo-inverse: of all images that shrink to a small one, that of least norm
    D x         x - stretch(shrink(x))

D is linear and D D x = D x, so the details of x_t are those of x_0 with noise: D x_t = a D x_0 + s
D eps, where a = sqrt(alpha_bar) and s = sqrt(1 - alpha_bar). With the standard deviation STD of the
details of photos, this is a diffusion of its own. Its unit vectors are those of Karras et al. 2022
(arXiv:2206.00364, Section 5), with q = sqrt(a^2 STD^2 + s^2):

    the network gets    D x_t / q
    it predicts         v = (a STD D eps - s D x_0 / STD) / q
    and so              D x_0 = STD (a STD D x_t / q - s v) / q

functions/enlarging.py adds the part that the small image says.
"""

from functools import cache

import torch
from torch import Tensor

from functions.noise_scheduler import Coefficient, NoiseScheduler, Timestep, broadcast

# The standard deviation of the details of photos of faces, at 64 and at 128 px.
STD = 0.07


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


def coefficients(scheduler: NoiseScheduler, t: Timestep) -> tuple[Coefficient, ...]:
    """Return a STD / q, s / q and 1 / q at t."""
    alpha_bar = scheduler.alpha_bar(t)
    q = (alpha_bar * STD**2 + 1 - alpha_bar) ** 0.5
    return alpha_bar**0.5 * STD / q, (1 - alpha_bar) ** 0.5 / q, 1 / q


def network_input(scheduler: NoiseScheduler, x_t: Tensor, t: Timestep) -> Tensor:
    """Return D x_t / q (B, C, H, W), of unit variance."""
    *_, scale = coefficients(scheduler, t)
    return broadcast(scale, x_t) * details(x_t)


def target(scheduler: NoiseScheduler, x_0: Tensor, t: Timestep, noise: Tensor) -> Tensor:
    """Return the v of the details (B, C, H, W)."""
    a, s, _ = (broadcast(each, x_0) for each in coefficients(scheduler, t))
    return details(a * noise - s / STD * x_0)


def from_output(
    scheduler: NoiseScheduler, x_t: Tensor, t: Timestep, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the details D x_0 that x_t and v imply, and the eps of these in x_t."""
    a, s, _ = (broadcast(each, x_t) for each in coefficients(scheduler, t))
    x_0 = STD * (a * network_input(scheduler, x_t, t) - s * v)
    return x_0, scheduler.predict_eps(x_t, t, x_0)


def eps_factor(scheduler: NoiseScheduler, t: Timestep) -> Coefficient:
    """Return the squared error of D eps for a squared error of 1 of v."""
    a, *_ = coefficients(scheduler, t)
    return a**2
