"""Prepare a data set ahead of training, download one, or check a copy of FFHQ by its md5 sums.

    python data/prepare.py FFHQ
    python data/prepare.py path/to/folder-or-archive --image-size 64
    python data/prepare.py MNIST --download
    python data/prepare.py FFHQ --verify ffhq-dataset-v2.json

Preparing is optional, because train.py prepares its data set itself. The side of the images is 128
pixels, or --image-size; --channels 1 makes them grey. --download downloads CIFAR10 or MNIST to
data/, and stops. With --verify, the images are checked first, and are prepared only if all are
correct. The exit code is 0 on success, 1 if the verification found differences, and 2 if the data
cannot be used.
"""

import argparse
import hashlib
import sys
from pathlib import Path

# When this file runs as a script, Python searches this folder for modules instead of the
# repository's root. So the root replaces this folder, whose datasets.py would also shadow the
# package `datasets`.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data.datasets import DATA_FOLDER, load_images, locate
from data.packed import LISTED, map_images
from data.sources import Source
from data.torchvision_sets import read_torchvision_set
from functions.support.errors import UserError
from functions.support.files import read_json, short


def main(arguments: list[str] | None = None) -> int:
    """Run the script and return its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--channels", type=int, default=3, choices=(1, 3))
    parser.add_argument("--download", action="store_true")
    parser.add_argument("--verify", metavar="JSON")
    args = parser.parse_args(arguments)
    if args.image_size < 1 or (args.download and args.verify):
        parser.error("--image-size is 1 or more, and --download goes without --verify")
    try:
        if args.download:
            read_torchvision_set(args.source, DATA_FOLDER, download=True)
            return 0
        if args.verify and not verify(locate(args.source, args.image_size), args.verify):
            return 1
        image_set = load_images(args.source, args.image_size, channels=args.channels)
        print(f"Ready: {image_set.summary}")
        return 0
    except (UserError, OSError) as error:
        parser.exit(2, f"error: {error}\n")


def verify(source: Source, json_path: str) -> bool:
    """Compare the md5 of every image's pixels, at its original size, with those in the json.

    The md5 is computed from raw pixels, so a lossless copy in another format matches. JPEGs and
    resized copies never match. Prints which images are wrong, missing or extra, and returns whether
    there are none. Raises UserError when the json cannot be read.
    """
    entries = read_json(Path(json_path))
    wrong = []
    md5_sums = map_images(source, lambda pixels: hashlib.md5(pixels).hexdigest(), "Verifying")
    for member, image_id, md5 in zip(source.members, source.ids, md5_sums, strict=True):
        # An entry has the md5 of all versions of its photo, such as those of 128 px and 1024 px.
        if str(md5) not in str(entries.pop(str(image_id), "no entry")):
            wrong.append(f"wrong or extra: {short(member.name)}: {md5}")
    wrong += [f"missing: {image_id}" for image_id in entries]
    count = f"{len(source.ids):,} images; wrong, extra or missing: {len(wrong):,}"
    print(count, *wrong[:LISTED], sep="\n")
    return not wrong


if __name__ == "__main__":
    sys.exit(main())
