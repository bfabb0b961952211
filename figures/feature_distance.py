"""How far samples are from real images, by features that need no network from elsewhere.

figures/experiments.py compares its arms by this distance.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from functions.support.random_numbers import generator_of

DIMENSIONS, FILTERS = 16, 16
# A corner whose RMS distance from white is at most this counts as white, on the scale 0 to 255.
WHITE = 10


class Features:
    """A Fréchet distance between fixed, untrained features; it is no FID.

    Its unit is the variance of the real images. 100 of the embedded people have a distance of 1.1
    to the others. The same images tinted by 10/255 have 1.5, blurred 4, and noise has 106.

    Args:
        real: (N, 3, H, W) in [-1, 1].
    """

    def __init__(self, real: Tensor):
        # Features differ in scale, and none of them is to count more for that.
        raw = filter_answers(real)
        self.mean = raw.mean(0)
        self.std = raw.std(0).clamp(min=1e-6)
        standardised = (raw - self.mean) / self.std

        # Only the axes of largest variance are kept. Dividing by the standard deviation along
        # each makes all of them count alike.
        values, vectors = torch.linalg.eigh(standardised.T.cov())
        deviations = values[-DIMENSIONS:].clamp(min=1e-9).sqrt()
        self.axes = vectors[:, -DIMENSIONS:] / deviations
        self.real = self(real)

    def __call__(self, images: Tensor) -> Tensor:
        """Return the features of images (N, 3, H, W): (N, DIMENSIONS) float64."""
        standardised = (filter_answers(images) - self.mean) / self.std
        return standardised @ self.axes

    def distance(self, images: Tensor) -> float:
        """Return the distance of images (N, 3, H, W) from the real ones."""
        return frechet_distance(self(images), self.real)


def filter_answers(images: Tensor) -> Tensor:
    """Return F raw features of images (N, 3, H, W): (N, F) float64.

    They are the image shrunk to 4 x 4 pixels, and the energy of random filters at three scales.
    """
    generator = generator_of("cpu", "features")
    filters = torch.randn(FILTERS, 3, 3, 3, generator=generator, dtype=torch.float64)
    # A filter without a mean does not answer to flat grey, which the 4 x 4 pixels show already.
    filters = filters - filters.mean((1, 2, 3), keepdim=True)
    norms = filters.flatten(1).norm(dim=1)
    filters = (filters / norms[:, None, None, None]).to(images.device)

    # Averages of 2 x 2 regions tell where in the image the energy is.
    images = images.double()
    parts = [F.adaptive_avg_pool2d(images, 4)]
    for scale in (1, 2, 4):
        shrunk = F.avg_pool2d(images, scale)
        answers = F.conv2d(shrunk, filters).abs()
        parts.append(F.adaptive_avg_pool2d(answers, 2))
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return the Fréchet distance of the Gaussians fitted to the rows of a and of b.

    It is |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)).
    """
    means = (a.mean(0) - b.mean(0)).square().sum()
    cov_a, cov_b = a.T.cov(), b.T.cov()

    # The symmetric matrix root C_b root has the same eigenvalues as C_a C_b, and eigvalsh takes
    # symmetric ones. Rounding can leave an eigenvalue below zero.
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    products = torch.linalg.eigvalsh(root @ cov_b @ root)
    cross = products.clamp(min=0).sqrt().sum()

    # Rounding can bring the distance of equal Gaussians below zero, too.
    distance = means + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(distance.item(), 0.0)


def spoilt(images: Tensor) -> Tensor:
    """Return which images (N, 3, H, W) are dark or speckled: (N,) bool.

    Those are the images in which no corner, of 2 x 2 pixels at 32 px, is white to 10/255 (RMS).
    All 901 embedded people have one that is white to 2.5/255.
    """
    k = images.shape[-1] // 16
    top, bottom = images[:, :, :k], images[:, :, -k:]
    corners = [top[..., :k], top[..., -k:], bottom[..., :k], bottom[..., -k:]]
    error = 1 - torch.stack(corners, dim=1)  # (N, 4, 3, k, k)
    rms = 127.5 * error.square().mean(dim=(2, 3, 4)).sqrt()  # (N, 4)
    return rms.amin(dim=1) > WHITE
