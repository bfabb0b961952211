"""Prepare a data set ahead of training, or check a copy of FFHQ against its published md5 sums.

    python data/prepare.py FFHQ
    python data/prepare.py path/to/folder-or-archive --image-size 64
    python data/prepare.py FFHQ --verify ffhq-dataset-v2.json

This is optional, because train.py prepares its data set itself. With --verify, the images are
checked first, and are prepared only if all are correct. The exit code is 0 on success, 1 if the
verification found differences, and 2 if the data cannot be used.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

# When this file runs as a script, Python searches this folder for modules instead of the
# repository's root. So the root replaces this folder, whose datasets.py would also shadow the
# package `datasets`.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data.datasets import load_images, locate
from data.decode import BadImage
from data.packed import LISTED, map_images
from data.sources import Source
from functions.support.command_line import Parser, exit_on_user_error, positive
from functions.support.errors import UserError
from functions.support.files import READ_ERRORS, short

# The json has these versions of each photo, at 128 px and at 1024 px.
VERSIONS = ("thumbnail", "image")


def main(arguments: list[str] | None = None) -> int:
    """Run the script and return its exit code."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="FFHQ, CIFAR10, MNIST, emoji_faces, emoji_people, or the path of a folder or archive.",
    )
    parser.add_argument(
        "--image-size",
        type=positive,
        default=128,
        metavar="S",
        help="The side of the prepared images in pixels. Default: %(default)s.",
    )
    parser.add_argument(
        "--channels",
        type=int,
        default=3,
        choices=(1, 3),
        help="3 for RGB, 1 for grey. Default: %(default)s.",
    )
    parser.add_argument(
        "--max-bad-images",
        type=int,
        default=0,
        metavar="N",
        help="Leave out at most this many unusable images. Default: %(default)s.",
    )
    parser.add_argument(
        "--verify",
        metavar="JSON",
        help="First compare every image with ffhq-dataset-v2.json. Default: no comparison.",
    )
    args = parser.parse_args(arguments)

    if args.verify:
        source = locate(args.source, args.image_size)
        report = verify(source, args.verify)
        print(", ".join(f"{len(names):,} {verdict}" for verdict, names in report.items()))
        del report["correct"]
        for verdict, names in report.items():
            for name in names[:LISTED]:
                print(f"  {verdict}: {name}")
        if any(report.values()):
            return 1

    image_set = load_images(args.source, args.image_size, args.max_bad_images, args.channels)
    print(f"Ready: {image_set.summary}")
    return 0


def verify(source: Source, json_path: str | Path) -> dict[str, list[str]]:
    """Compare the md5 of every image's pixels, at its original size, with the one in the json.

    The md5 is computed from raw pixels, so a lossless copy in another format matches. JPEGs and
    resized copies never match. Returns the names of the images that are "correct", "wrong" (with
    the reason), "missing" and "extra". Raises UserError when the json cannot be read or is not
    ffhq-dataset-v2.json, or when the source's images are not numbered.
    """
    expected = read_expected(json_path)
    # The ids of a source are either all numbers or all names.
    if isinstance(source.ids[0], str):
        raise UserError(
            f"{source.path}: the images have no numbers, so {json_path} cannot be compared."
        )

    correct = []
    wrong = []
    results = map_images(source, size_and_md5, "Verifying")
    for i, (image_id, result) in enumerate(zip(source.ids, results, strict=True)):
        name = short(source.name_of(i))
        if isinstance(result, BadImage):
            wrong.append(f"{name}: {result}")
        elif image_id in expected:
            sums = expected[image_id]
            if result in sums.items():
                correct.append(name)
            else:
                choice = " or ".join(f"{size} with {md5}" for size, md5 in sums.items())
                wrong.append(f"{name}: is {result[0]} with pixel_md5 {result[1]}, not {choice}")

    missing = [f"id {image_id}" for image_id in sorted(expected.keys() - source.ids)]
    extra = [f"id {image_id}" for image_id in source.ids if image_id not in expected]
    return {"correct": correct, "wrong": wrong, "missing": missing, "extra": extra}


def size_and_md5(rgb: np.ndarray) -> tuple[str, str]:
    """Return the size of an image, as "128x128", and the md5 of its pixels."""
    md5 = hashlib.md5(rgb.tobytes(), usedforsecurity=False)
    return f"{rgb.shape[1]}x{rgb.shape[0]}", md5.hexdigest()


def read_expected(json_path: str | Path) -> dict[int, dict[str, str]]:
    """Read ffhq-dataset-v2.json -> a dict from id to a dict from size ("128x128") to pixel_md5.

    Each inner dict has both VERSIONS. Raises UserError when the file cannot be read or is another
    file.
    """
    expected = {}
    try:
        entries = json.loads(Path(json_path).read_bytes())
        for key, entry in entries.items():
            versions = [entry[name] for name in VERSIONS]
            expected[int(key)] = {
                "{}x{}".format(*version["pixel_size"]): version["pixel_md5"] for version in versions
            }
        if not expected:
            raise ValueError("no entries")
        return expected
    except OSError as error:
        raise UserError(f"{json_path} cannot be read ({error.strerror}).") from None
    except READ_ERRORS:
        raise UserError(
            f"{json_path} is not a complete ffhq-dataset-v2.json; its size should be 267,793,842 "
            "bytes."
        ) from None


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main())
