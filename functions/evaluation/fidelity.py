"""Compare samples with real images: by a distance of fixed features, or by torch-fidelity.

    distance            The Frechet distance along the main axes of features by fixed, untrained
                        filters, for which nothing is downloaded; it is not FID.
    FID                 The Frechet distance between two Gaussians with the means and covariances of
                        the features (Heusel et al. 2017). Its bias depends on the number of images.
    KID                 The squared maximum mean discrepancy with a cubic kernel, averaged over
                        random subsets (Binkowski et al. 2018): unbiased, so it can be negative.
    precision, recall   The fraction of samples within the manifold of the real images, and the
                        opposite (Kynkaanniemi et al. 2019).

All but the first use the same features of InceptionV3, as ADM's evaluator does.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data.datasets import ImageSet, Split, load_images, split_images
from data.decode import to_pixels
from data.pictures import open_image_file
from data.pixels import to_model_range
from functions.sampling.samples_folder import MANIFEST, image_indices, image_path
from functions.support.errors import UserError
from functions.support.files import read_json

# torch-fidelity would otherwise take another network for precision and recall.
EXTRACTOR = "inception-v3-compat"
# Precision and recall need three neighbours of each image.
FEWEST = 4

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


@dataclass(frozen=True)
class Images(Dataset):
    """Images to measure; for torch-fidelity they are uint8 RGB (3, H, W)."""

    count: int
    # It returns the pixels of the image with this position, uint8 (H, W, C).
    read: Callable[[int], np.ndarray]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> Tensor:
        # Grey is repeated to three channels.
        return torch.tensor(self.read(position)).permute(2, 0, 1).expand(3, -1, -1)


def folder_images(folder: Path) -> Images:
    """Return the images of a folder, which sample.py --individual has written.

    Raises UserError when one is missing, or there are too few; and in reading a damaged file, or
    one of another size than image 0.
    """
    indices = image_indices(folder)
    count = len(indices)
    if count < FEWEST or max(indices) >= count:
        raise UserError(
            f"{folder} has {count} images; there must be {FEWEST} or more, 00000.png and so on, "
            "without a gap: sample again, or name another folder"
        )

    size = open_image_file(image_path(folder, 0)).size

    def read(i):
        path = image_path(folder, i)
        image = open_image_file(path)
        if image.size != size:
            raise UserError(f"{path} has another size than 00000.png; a folder needs one size")
        return to_pixels(image, 3)

    return Images(count, read)


def set_images(image_set: ImageSet, indices: np.ndarray) -> Images:
    """Return the images of a data set with these indices."""
    return Images(len(indices), lambda i: image_set.images[indices[i]])


def load_like(folder: Path, name: str) -> tuple[ImageSet, Split]:
    """Load and split the data set that samples in a folder are compared with; print the split.

    The images have the size and colours of the samples. The split is that of the model which drew
    these, if their manifest says it.
    """
    image = open_image_file(image_path(folder, 0))
    # Packing prints which images are left out.
    image_set = load_images(name, image.height, sys.maxsize, 1 if image.mode == "L" else 3)
    path = folder / MANIFEST
    manifest = read_json(path) if path.exists() else {}
    split = split_images(image_set, manifest.get("split", "reference"))
    print(split.description)
    return image_set, split


def measure_fidelity(samples: Images, real: Images, device: torch.device) -> dict[str, float]:
    """Return FID, KID and its deviation, precision and recall, by torch-fidelity's names.

    It downloads the weights of InceptionV3 on first use. Raises UserError for too few real images
    and without torch-fidelity, and torch-fidelity's own errors.
    """
    if len(real) < FEWEST:
        raise UserError(f"there are {len(real)} real images; there must be {FEWEST} or more")
    try:
        from torch_fidelity import calculate_metrics
    except ImportError as error:
        raise UserError(
            "FID, KID, precision and recall need torch-fidelity: "
            "pip install -r requirements-eval.txt"
        ) from error
    return calculate_metrics(
        input1=samples,
        input2=real,
        # torch-fidelity would find features by a name, which other images may have, too.
        cache=False,
        feature_extractor=EXTRACTOR,
        cuda=device.type == "cuda",
        fid=True,
        kid=True,
        prc=True,
        # If all subsets were the whole, KID would have no standard deviation.
        kid_subset_size=min(1000, len(samples) // 2, len(real) // 2),
        # Without processes that load images, and with less memory for distances.
        save_cpu_ram=True,
    )


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
    """Return the distance of images with these features, (N, DIMENSIONS), from the real ones.

    It is |m|^2 + tr(C + I - 2 C^(1/2)), because the features of the real images have mean 0 and
    covariance I (`features_beside`). There must be two images or more.
    """
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
        responses = F.conv2d(F.avg_pool2d(images, scale), filters).abs()
        parts.append(F.adaptive_avg_pool2d(responses, 2))
    return torch.cat([part.flatten(1) for part in parts], dim=1)
