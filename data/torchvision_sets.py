"""Read CIFAR-10 and MNIST by torchvision, which can also download them."""

import zlib
from pathlib import Path

import numpy as np

from data.sources import Member, Source
from functions.support.errors import READ_ERRORS, UserError, short

# What must be in the data folder for each set.
FILES = {
    "CIFAR10": "cifar-10-batches-py, unpacked from cifar-10-python.tar.gz (the binary version is "
    "not read)",
    "MNIST": "MNIST/raw, a folder with its four files, such as train-images-idx3-ubyte",
}


def read_torchvision_set(name: str, folder: Path, download: bool = False) -> Source:
    """Read all images of a set in FILES from a data folder; the test images are the last ones.

    CIFAR-10's are uint8 (32, 32, 3), and MNIST's (28, 28, 1). A missing set is downloaded if
    `download` is true. Raises UserError when a set is damaged, missing, or not in FILES.
    """
    if name not in FILES:
        raise UserError(f"{name} cannot be downloaded, only {' and '.join(FILES)} can.")

    # This import takes a second.
    from torchvision import datasets

    try:
        dataset = getattr(datasets, name)
        train, test = (dataset(folder, train, download=download).data for train in (True, False))
    except READ_ERRORS as error:
        raise UserError(
            f"{name} cannot be read from {folder} ({short(error)}). Delete a damaged copy, and put "
            f"there {FILES[name]}; python data/prepare.py {name} --download does so, where there "
            "is a network."
        ) from None

    images = np.concatenate([train, test])
    # MNIST has no dimension for its one channel.
    images = images.reshape(*images.shape[:3], -1)
    members = {
        i: Member(
            f"{'train' if i < len(train) else 'test'}/{i}",
            zlib.crc32(image.tobytes()),
            image.copy,
        )
        for i, image in enumerate(images)
    }
    return Source(folder / name, members)
