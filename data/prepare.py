"""Prepare a data set ahead of training, or download one.

    python data/prepare.py FFHQ
    python data/prepare.py path/to/folder-or-archive --image-size 64
    python data/prepare.py MNIST --download

Preparing is optional, because train.py does it, too. The side of the images is 128 pixels, or
--image-size; --channels 1 makes them grey. --download downloads CIFAR10 or MNIST to data/, and
stops. The exit code is 0 on success, and 2 if the data cannot be used.
"""

import sys
from pathlib import Path

# When this file runs as a script, Python searches this folder for modules instead of the
# repository's root. So the root replaces this folder, whose datasets.py would also shadow the
# package `datasets`.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data.datasets import DATA_FOLDER, load_images
from data.sources import read_torchvision_set
from functions.support.command_line import Parser, positive, run_script


def main() -> None:
    """Run the script."""
    parser = Parser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("--image-size", type=positive, default=128)
    parser.add_argument("--channels", type=int, default=3, choices=(1, 3))
    parser.add_argument("--download", action="store_true")
    args = parser.parse_args()
    if args.download:
        read_torchvision_set(args.source, DATA_FOLDER, download=True)
        return
    image_set = load_images(args.source, args.image_size, channels=args.channels)
    print(f"Ready: {image_set.summary}")


if __name__ == "__main__":
    run_script(main)
