"""Measure the distance of images from a model's training images without a downloaded network."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data.batches import batches_of
from data.datasets import ImageSet, Split
from data.pixels import to_model_range
from functions.evaluation.fidelity import Images, set_images
from functions.support.errors import UserError

DIMENSIONS, FILTERS = 16, 16
# The seed of these filters. With another one, distances differ from those in docs/.
FILTER_SEED = 1057978271
# The responses of so many images fit in a processor's cache; with 256, the time is 2.5 times that.
BATCH = 16
# A corner is white if its RMS distance from white is at most this, on the scale 0 to 255.
WHITE = 10


class Features:
    """Fixed, untrained features of images, and the Fréchet distance between them; it is not FID.

    The unit of the distance is the variance of the real images. 100 of the embedded people have a
    distance of 1.1 to the others. If these 100 are tinted by 10/255 the distance is 1.5, and if
    they are blurred it is 4. For noise it is 106.

    Args:
        real: batches of the real images, (B, C, H, W) in [-1, 1].
    """

    def __init__(self, real: Iterable[Tensor]):
        # Standardised features have equal weight, whatever their scale.
        raw = torch.cat([*map(raw_features, real)])
        self.mean = raw.mean(0)
        self.std = raw.std(0).clamp(min=1e-6)
        standardised = (raw - self.mean) / self.std

        # These are the principal axes of largest variance. Dividing by the standard deviation along
        # each axis gives all axes equal weight.
        values, vectors = torch.linalg.eigh(standardised.T.cov())
        deviations = values[-DIMENSIONS:].clamp(min=1e-9).sqrt()
        self.axes = vectors[:, -DIMENSIONS:] / deviations
        self.real = standardised @ self.axes

    def __call__(self, batches: Iterable[Tensor]) -> Tensor:
        """Return the features of N images, (B, C, H, W) in each batch: (N, DIMENSIONS) float64."""
        raw = torch.cat([*map(raw_features, batches)])
        return (raw - self.mean) / self.std @ self.axes

    def distance(self, features: Tensor) -> float:
        """Return the distance of images with these features, (N, DIMENSIONS), from the real ones.

        Raises UserError for fewer than two images.
        """
        if len(features) < 2:
            raise UserError("a distance compares variances, so it needs two images or more")
        return frechet_distance(features, self.real)


def training_features(image_set: ImageSet, split: Split) -> Features:
    """Return the features of the training images, as they are and mirrored."""
    training = set_images(image_set, split.train_indices)
    # Training flips images, so samples may face either way.
    return Features(image for x_0 in model_batches(training) for image in (x_0, x_0.flip(3)))


def model_batches(images: Images) -> Iterator[Tensor]:
    """Yield images in batches, (B, C, H, W) in [-1, 1]."""
    batches = batches_of(range(len(images)), BATCH)
    for batch in tqdm(batches, "features", unit="batch", leave=False):
        pixels = np.stack([images.read(i) for i in batch])
        yield to_model_range(torch.from_numpy(pixels))


def raw_features(images: Tensor) -> Tensor:
    """Return F features of images (N, C, H, W): (N, F) float64.

    They are the image shrunk to 4 x 4 pixels, and the responses of random filters at three scales.
    """
    generator = torch.Generator().manual_seed(FILTER_SEED)
    filters = torch.randn(FILTERS, 3, 3, 3, generator=generator, dtype=torch.float64)
    # Filters of mean 0 ignore the brightness of a region, which the 4 x 4 pixels already have.
    filters = filters - filters.mean((1, 2, 3), keepdim=True)
    filters = F.normalize(filters, dim=(1, 2, 3))

    # Averages over 2 x 2 regions tell where in the image the responses are strong.
    # Grey is repeated to three channels.
    images = images.double().expand(-1, 3, -1, -1)
    parts = [F.adaptive_avg_pool2d(images, 4)]
    for scale in (1, 2, 4):
        shrunk = F.avg_pool2d(images, scale)
        responses = F.conv2d(shrunk, filters).abs()
        parts.append(F.adaptive_avg_pool2d(responses, 2))
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return the Fréchet distance of the Gaussians fitted to the rows of a and of b.

    It is |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)).
    """
    means = (a.mean(0) - b.mean(0)).square().sum()
    cov_a = a.T.cov()
    cov_b = b.T.cov()

    # With root = C_a^(1/2), root C_b root has the eigenvalues of C_a C_b and is symmetric, as
    # eigvalsh requires. Rounding can leave an eigenvalue below zero.
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    products = torch.linalg.eigvalsh(root @ cov_b @ root)
    cross = products.clamp(min=0).sqrt().sum()

    # Rounding can bring the distance of equal Gaussians below zero, too.
    distance = means + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(distance.item(), 0.0)


def spoilt(images: Tensor) -> Tensor:
    """Return whether each of the images (N, 3, H, W) is dark or speckled: (N,) bool.

    In such an image every corner (2 x 2 pixels at 32 px) differs from white by more than 10/255
    RMS. Each of the 901 embedded people has a corner that differs by at most 2.5/255.
    """
    k = max(1, images.shape[-1] // 16)
    ends = (slice(k), slice(-k, None))
    corners = [images[..., rows, columns] for rows in ends for columns in ends]
    # (4, N): the mean squared distance of each corner from white
    squares = torch.stack([(1 - corner).square().mean((1, 2, 3)) for corner in corners])
    return 127.5 * squares.amin(dim=0).sqrt() > WHITE
