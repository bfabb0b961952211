"""Measure the distance of images from training images without a downloaded network."""

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from data.datasets import ImageSet, Split
from data.pixels import to_model_range
from functions.evaluation.fidelity import Images, set_images
from functions.support.errors import UserError

DIMENSIONS, FILTERS = 16, 16
# The variance of real images along the last of these axes is 0.7 or more, and about 0 for fewer
# images than axes.
SMALLEST_VARIANCE = 0.1
# Filters of 3 x 3 pixels at a quarter of the size need so many pixels a side.
SMALLEST_SIDE = 12
# The seed of these filters. With another one, distances differ from those in docs/.
FILTER_SEED = 1057978271
# The responses of so many images fit in a processor's cache; with 256, the time is 2.5 times that.
BATCH = 16


# It returns the features of N images, (B, C, H, W) in each batch: (N, DIMENSIONS) float64.
Features = Callable[[Iterable[Tensor]], Tensor]


def features_beside(real: Iterable[Tensor]) -> Features:
    """Return fixed, untrained features of images, whose unit is the variance of real images.

    `real` are batches of these, (B, C, H, W) in [-1, 1]. Raises UserError if they are too few or
    too alike.
    """
    # Standardised features have equal weight, whatever their scale.
    raw = torch.cat([*map(raw_features, real)])
    mean = raw.mean(0)
    std = raw.std(0).clamp(min=1e-6)

    # These are the principal axes of largest variance. Dividing by the standard deviation along
    # each axis gives all axes equal weight.
    values, vectors = torch.linalg.eigh(((raw - mean) / std).T.cov())
    # Where the real images are alike, a distance has no unit.
    if values[-DIMENSIONS] < SMALLEST_VARIANCE:
        raise UserError(
            "the training images are too few, or too alike, for a distance along "
            f"{DIMENSIONS} axes; name a data set with more images"
        )
    axes = vectors[:, -DIMENSIONS:] / values[-DIMENSIONS:].sqrt()
    return lambda batches: (torch.cat([*map(raw_features, batches)]) - mean) / std @ axes


def frechet_distance(features: Tensor) -> float:
    """Return the distance of images with these features from the real ones; it is not FID.

    It is |m|^2 + tr(C + I - 2 C^(1/2)), because the features of the real images have mean 0 and
    covariance I. Raises UserError for fewer than two images.
    """
    if len(features) < 2:
        raise UserError("a distance compares variances, so it needs two images or more")
    # Rounding can leave an eigenvalue below zero.
    variances = torch.linalg.eigvalsh(features.T.cov()).clamp(min=0)
    differences = torch.cat([features.mean(0), variances.sqrt() - 1])
    return differences.square().sum().item()


def training_features(image_set: ImageSet, split: Split) -> Features:
    """Return the features of the training images, as they are and mirrored."""
    training = set_images(image_set, split.train_indices)
    # Training flips images, so samples may face either way.
    return features_beside(x for x_0 in model_batches(training) for x in (x_0, x_0.flip(3)))


def model_batches(images: Images) -> Iterator[Tensor]:
    """Yield images in batches, (B, 3, H, W) in [-1, 1]."""
    for batch in tqdm(DataLoader(images, BATCH), "features", unit="batch", leave=False):
        yield to_model_range(batch.permute(0, 2, 3, 1))


def raw_features(images: Tensor) -> Tensor:
    """Return F features of images (N, C, H, W): (N, F) float64.

    They are the image shrunk to 4 x 4 pixels, and the responses of random filters at three scales.
    Raises UserError for images that are too small.
    """
    if min(images.shape[2:]) < SMALLEST_SIDE:
        raise UserError(
            f"a distance needs images of {SMALLEST_SIDE} pixels a side or more; "
            f"these have {min(images.shape[2:])}"
        )
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
