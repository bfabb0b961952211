"""Compare samples with real images by torch-fidelity: FID, KID, precision and recall.

    FID                 The Frechet distance between two Gaussians with the means and covariances of
                        the features (Heusel et al. 2017). Its bias depends on the number of images.
    KID                 The squared maximum mean discrepancy with a cubic kernel, averaged over
                        random subsets (Binkowski et al. 2018): unbiased, so it can be negative.
    precision, recall   The fraction of samples within the manifold of the real images, and the
                        opposite (Kynkaanniemi et al. 2019).

All use the same features of InceptionV3, as ADM's evaluator does.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.datasets import ImageSet, Split, load_images, split_images
from data.decode import open_image_file, to_pixels
from functions.sampling.samples_folder import MANIFEST, image_indices, image_path
from functions.support.errors import UserError, short
from functions.support.files import read_json

# torch-fidelity would otherwise take another network for precision and recall.
EXTRACTOR = "inception-v3-compat"
# Precision and recall need three neighbours of each image.
FEWEST = 4


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
    channels = 1 if image.mode == "L" else 3
    # Packing prints which images are left out.
    image_set = load_images(name, image.height, sys.maxsize, channels)
    path = folder / MANIFEST
    manifest = read_json(path) if path.exists() else {}
    split = split_images(image_set, manifest.get("split", "reference"))
    print(split.description)
    return image_set, split


def inception_weights() -> Path:
    """Return the path of the weights of InceptionV3, after reading them without running code.

    Raises UserError when torch-fidelity or the file is missing, or when it has other contents.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    except ImportError as error:
        raise UserError(
            "FID, KID, precision and recall need torch-fidelity: "
            "pip install -r requirements-eval.txt"
        ) from error
    path = Path(torch.hub.get_dir(), "checkpoints", Path(URL_INCEPTION_V3).name)
    if not path.exists():
        raise UserError(f"the weights of InceptionV3 are missing: put {URL_INCEPTION_V3} at {path}")
    try:
        torch.load(path, weights_only=True)
    except Exception as error:
        # For damaged pickles, PyTorch raises errors of many types.
        raise UserError(f"{path} is not the file of {URL_INCEPTION_V3}: {short(error)}") from error
    return path


def measure_fidelity(samples: Images, real: Images, device: torch.device) -> dict[str, float]:
    """Return FID, KID and its deviation, precision and recall, by torch-fidelity's names.

    Raises UserError for too few real images.
    """
    if len(real) < FEWEST:
        raise UserError(f"there are {len(real)} real images; there must be {FEWEST} or more")
    weights = inception_weights()
    from torch_fidelity import calculate_metrics

    return calculate_metrics(
        input1=samples,
        input2=real,
        # torch-fidelity would find features by a name, which other images may have, too.
        cache=False,
        feature_extractor=EXTRACTOR,
        feature_extractor_weights_path=str(weights),
        cuda=device.type == "cuda",
        fid=True,
        kid=True,
        prc=True,
        # If all subsets were the whole, KID would have no standard deviation.
        kid_subset_size=min(1000, len(samples) // 2, len(real) // 2),
        # Without processes that load images, and with less memory for distances.
        save_cpu_ram=True,
    )
