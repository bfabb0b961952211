"""Read CIFAR-10 and MNIST by torchvision, which can also download them."""

import zlib
from pathlib import Path

import numpy as np
from torchvision import datasets

from data.decode import BadImage, parsing
from data.sources import Member, Source
from functions.support.errors import UserError

# What must be in the data folder for each set.
PLACES = {
    "CIFAR10": "cifar-10-batches-py, unpacked from cifar-10-python.tar.gz (the binary version is "
    "not read)",
    "MNIST": "MNIST/raw, a folder with its four files, such as train-images-idx3-ubyte",
}


def read_set(name: str, folder: Path, download: bool = False) -> Source:
    """Read all images of a set of PLACES in a data folder; the test images are the last ones.

    CIFAR-10's are uint8 (32, 32, 3), and MNIST's (28, 28, 1). A missing set is downloaded if
    `download` is true. Raises UserError when a set is damaged, missing, or not in PLACES.
    """
    if name not in PLACES:
        raise UserError(f"{name} cannot be downloaded, only {' and '.join(PLACES)} can.")
    dataset = getattr(datasets, name)
    try:
        with parsing("cannot be read"):
            train, test = (dataset(folder, train, download=download) for train in (True, False))
    except BadImage as error:
        raise UserError(
            f"{name} {error}. Delete a damaged copy, and put into {folder} {PLACES[name]}; "
            f"python data/prepare.py {name} --download does so, where there is a network."
        ) from error

    source = Source(folder / name, {}, "test")
    for side, part in (("train", train), ("test", test)):
        for image, target in zip(np.asarray(part.data), part.targets, strict=True):
            i = len(source.members)
            # MNIST has no dimension for its one channel, and calls its classes "5 - five".
            pixels = image.reshape(*image.shape[:2], -1)
            label = part.classes[target].partition(" - ")[0]
            stamp = zlib.crc32(pixels.tobytes())
            source.members[i] = Member(f"{side}/{i}", stamp, pixels.copy, side, label)
    return source
