"""Prepare a data set ahead of training, or check a copy of FFHQ against its published md5 sums.

    python data/prepare.py FFHQ
    python data/prepare.py path/to/folder-or-zip-or-npz --image-size 64
    python data/prepare.py FFHQ --verify ffhq-dataset-v2.json

train.py prepares by itself what is not prepared yet. With --verify the images are checked first,
and prepared only when every one is right. Exit code: 0 fine, 1 the verification found
differences, 2 the data cannot be used.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

# When this runs as a script, Python looks for modules in this folder first, not in the repository's
# root where `data` lies. The root takes its place, as datasets.py would hide another package here.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data.datasets import load_images, locate
from data.decode import BadImage
from data.packed import LISTED, map_images
from data.sources import Source
from functions.support.command_line import Parser, exit_on_user_error, positive
from functions.support.errors import UserError
from functions.support.files import READ_ERRORS, short

# The json lists these versions of a photo: 128 px and 1024 px.
VERSIONS = ("thumbnail", "image")


def main(arguments: list[str] | None = None) -> int:
    """Run the script and return its exit code."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="FFHQ, CIFAR10, emoji_faces, emoji_people, or the path of a folder or archive.",
    )
    parser.add_argument(
        "--image-size",
        type=positive,
        default=128,
        metavar="S",
        help="The side of the prepared images in pixels. Default: %(default)s.",
    )
    parser.add_argument(
        "--max-bad-images",
        type=int,
        default=0,
        metavar="N",
        help="How many unusable images may be left out. Default: %(default)s.",
    )
    parser.add_argument(
        "--verify",
        metavar="JSON",
        help="First compare every image with ffhq-dataset-v2.json. Default: no comparison.",
    )
    args = parser.parse_args(arguments)

    if args.verify:
        source = locate(args.source, args.image_size)
        names = verify(source, args.verify)
        print(", ".join(f"{len(listed):,} {kind}" for kind, listed in names.items()))
        del names["correct"]
        for kind, listed in names.items():
            for name in listed[:LISTED]:
                print(f"  {kind}: {name}")
        if any(names.values()):
            return 1

    images = load_images(args.source, args.image_size, args.max_bad_images)
    print(f"Ready: {images.summary}")
    return 0


def verify(source: Source, json_path: str | Path) -> dict[str, list[str]]:
    """Compare the pixel_md5 of every image of a source, at its own size, with the json's.

    It is over the raw pixels, so it also fits re-encoded lossless copies; JPEGs and resized copies
    never match. Returns the names of the images that are "correct", "wrong" (with the reason),
    "missing" and "extra". Raises UserError when the json cannot be read or is another file than
    ffhq-dataset-v2.json, or when the source's images aren't numbered.
    """
    expected = read_expected(json_path)
    # The ids of a source are either all numbers or all names.
    if isinstance(source.ids[0], str):
        raise UserError(
            f"{source.path}: the images have no numbers by which {json_path} could be compared."
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
                right = " or ".join(f"{size} with {md5}" for size, md5 in sums.items())
                wrong.append(f"{name}: is {result[0]} with pixel_md5 {result[1]}, not {right}")

    missing = [f"id {image_id}" for image_id in sorted(expected.keys() - source.ids)]
    extra = [f"id {image_id}" for image_id in source.ids if image_id not in expected]
    return {"correct": correct, "wrong": wrong, "missing": missing, "extra": extra}


def size_and_md5(rgb: np.ndarray) -> tuple[str, str]:
    """Return the size of an image, as "128x128", and the md5 of its pixels."""
    md5 = hashlib.md5(rgb.tobytes(), usedforsecurity=False)
    return f"{rgb.shape[1]}x{rgb.shape[0]}", md5.hexdigest()


def read_expected(json_path: str | Path) -> dict[int, dict[str, str]]:
    """Read ffhq-dataset-v2.json -> by id, the pixel_md5 by size ("128x128") of both VERSIONS.

    Raises UserError when it isn't that file.
    """
    expected = {}
    try:
        entries = json.loads(Path(json_path).read_bytes())
        for key, entry in entries.items():
            sums = {}
            for version in VERSIONS:
                size = "{}x{}".format(*entry[version]["pixel_size"])
                sums[size] = entry[version]["pixel_md5"]
            expected[int(key)] = sums
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
