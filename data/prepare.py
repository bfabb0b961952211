"""Prepare a data set ahead of training, or download one.

    python data/prepare.py FFHQ
    python data/prepare.py path/to/folder-or-zip --image-size 64
    python data/prepare.py MNIST --download

Preparing is optional, because train.py does it, too. The exit code is 0 on
success, and 2 if the data cannot be used.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# When this file runs as a script, Python searches this folder for modules instead of the
# repository's root. So the root replaces this folder, whose datasets.py would also shadow the
# package `datasets`.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data.datasets import load_images, read_torchvision_set
from functions.support.command_line import read_flags, run_script, split_words
from functions.support.settings import check_fields


@dataclass(frozen=True)
class PrepareFlags:
    """The flags of this script."""

    # The side of the images in pixels.
    image_size: int = 128
    # 1 makes them grey.
    channels: Literal[3, 1] = 3
    # Download CIFAR10 or MNIST to data/, and stop.
    download: bool = False

    def __post_init__(self) -> None:
        check_fields(self)


def main() -> None:
    """Run the script."""
    [source], words = split_words("DATA", sys.argv[1:])
    flags = read_flags(PrepareFlags(), words, "DATA", __doc__)
    if flags.download:
        read_torchvision_set(source, download=True)
        return
    image_set = load_images(source, flags.image_size, channels=flags.channels)
    print(f"Ready: {image_set.summary}")


if __name__ == "__main__":
    run_script(main)
