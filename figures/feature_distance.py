"""How far samples are from real images, without a network from elsewhere: what figures/experiments.py compares by."""

import torch
import torch.nn.functional as F
from torch import Tensor

from functions.support.random_numbers import generator_of

DIMENSIONS, FILTERS = 16, 16
WHITE = 10  # of 255


class Features:
    """A Fréchet distance between fixed, untrained features, in units of the real images' variance; no FID.

    Args:
        real: (N, 3, H, W) in [-1, 1]. 100 of the embedded people have 1.1 to the others, the same tinted by 10/255 1.5,
            blurred 4, noise 106.
    """

    def __init__(self, real: Tensor):
        raw = filter_answers(real)
        self.mean, self.std = raw.mean(0), raw.std(0).clamp(min=1e-6)
        values, vectors = torch.linalg.eigh(((raw - self.mean) / self.std).T.cov())
        self.axes = vectors[:, -DIMENSIONS:] / values[-DIMENSIONS:].clamp(min=1e-9).sqrt()
        self.real = self(real)

    def __call__(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, DIMENSIONS) float64."""
        return (filter_answers(images) - self.mean) / self.std @ self.axes

    def distance(self, images: Tensor) -> float:
        return frechet_distance(self(images), self.real)


def filter_answers(images: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N, F) float64: 4 x 4 pixels, and the energy of random filters at three scales."""
    filters = torch.randn(
        FILTERS, 3, 3, 3, generator=generator_of("cpu", "features"), dtype=torch.float64
    )
    # Flat grey says nothing: the pixels know that already
    filters = filters - filters.mean((1, 2, 3), keepdim=True)
    filters = (filters / filters.flatten(1).norm(dim=1)[:, None, None, None]).to(images.device)
    images = images.double()
    parts = [F.adaptive_avg_pool2d(images, 4)]
    for scale in (1, 2, 4):
        answers = F.conv2d(F.avg_pool2d(images, scale), filters).abs()
        parts.append(F.adaptive_avg_pool2d(answers, 2))
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of Gaussians fitted to the rows of a and of b."""
    cov_a, cov_b = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # C_a C_b and this symmetric matrix have the same eigenvalues
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(distance.item(), 0.0)


def spoilt(images: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N,) bool: dark or speckled, as no corner of 2 x 2 pixels at 32 px is white to 10/255 (RMS).

    All 901 embedded people have one that is white to 2.5/255.
    """
    k = images.shape[-1] // 16
    rows = images[:, :, :k], images[:, :, -k:]
    corners = torch.stack([part for row in rows for part in (row[..., :k], row[..., -k:])], dim=1)
    rms = 127.5 * (1 - corners).square().mean(dim=(2, 3, 4)).sqrt()  # (N, 4)
    return rms.amin(dim=1) > WHITE
