"""Prepare a data set ahead of training, or check a copy of FFHQ against its published md5 sums.

    python data/prepare.py FFHQ
    python data/prepare.py path/to/folder-or-zip-or-npz --image-size 64
    python data/prepare.py FFHQ --verify ffhq-dataset-v2.json

train.py prepares by itself what is not prepared yet. With --verify the images are checked first, and prepared only when
every one is right. Exit code: 0 fine, 1 the verification found differences, 2 the data cannot be used.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

# Run as a script, Python looks for modules in this folder, not in the repository's root where `data` lies.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.datasets import load_images, locate
from data.decode import BadImage
from data.packed import map_images
from data.sources import Source
from functions.support.command_line import Parser, plain_errors, positive
from functions.support.errors import UserError
from functions.support.files import short

LISTED = 20  # at most, of each kind of difference
VERSIONS = ("thumbnail", "image")  # of a photo, in the json


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    source_help = "FFHQ, CIFAR10, emoji_faces, emoji_people, or the path of a folder or archive"
    parser.add_argument("source", metavar="SOURCE", help=source_help)
    parser.add_argument(
        "--image-size", type=positive, default=128, metavar="S", help="pixels (128)"
    )
    parser.add_argument(
        "--max-bad-images", type=int, default=0, metavar="N", help="so many may be left out (0)"
    )
    parser.add_argument(
        "--verify", metavar="JSON", help="check every image against ffhq-dataset-v2.json (no check)"
    )
    args = parser.parse_args(arguments)
    if args.verify:
        names = verify(locate(args.source, args.image_size), args.verify)
        print(", ".join(f"{len(listed):,} {kind}" for kind, listed in names.items()))
        for kind in ("wrong", "missing", "extra"):
            for name in names[kind][:LISTED]:
                print(f"  {kind}: {name}")
        if len(names["correct"]) < sum(map(len, names.values())):
            return 1
    print(f"Ready: {load_images(args.source, args.image_size, args.max_bad_images).summary}")
    return 0


def verify(source: Source, json_path: str | Path) -> dict[str, list[str]]:
    """Compare the pixel_md5 of every image of a source, at its own size, with ffhq-dataset-v2.json.

    That is over the raw pixels, so it also fits re-encoded lossless copies; JPEGs and resized copies never match.
    Returns the names of the images that are "correct", "wrong" (with the reason), "missing" and "extra".
    Raises UserError when the json cannot be read or is another file, or when the source's images aren't numbered.
    """
    expected = read_expected(json_path)
    if not all(isinstance(image_id, int) for image_id in source.ids):
        raise UserError(
            f"{source.path}: the images have no numbers by which {json_path} could be compared."
        )
    names = {"correct": [], "wrong": []}
    results = tqdm(
        map_images(source, size_and_md5), "Verifying", len(source.ids), unit="img", delay=1.0
    )
    for i, (image_id, result) in enumerate(zip(source.ids, results, strict=True)):
        # In one array of all the images have no names of their own
        name = (
            short(source.members[i].name)
            if len(source.members) == len(source.ids)
            else f"image {image_id}"
        )
        if isinstance(result, BadImage):
            names["wrong"].append(f"{name}: {result}")
        elif image_id in expected and result in expected[image_id].items():
            names["correct"].append(name)
        elif image_id in expected:
            right = " or ".join(f"{size} with {md5}" for size, md5 in expected[image_id].items())
            names["wrong"].append(f"{name}: is {result[0]} with pixel_md5 {result[1]}, not {right}")
    names["missing"] = [f"id {image_id}" for image_id in sorted(expected.keys() - set(source.ids))]
    names["extra"] = [f"id {image_id}" for image_id in source.ids if image_id not in expected]
    return names


def size_and_md5(rgb: np.ndarray) -> tuple[str, str]:
    """The size of an image, as "128x128", and the md5 of its pixels."""
    return f"{rgb.shape[1]}x{rgb.shape[0]}", hashlib.md5(
        rgb.tobytes(), usedforsecurity=False
    ).hexdigest()


def read_expected(json_path: str | Path) -> dict[int, dict[str, str]]:
    """Read ffhq-dataset-v2.json -> by id, the pixel_md5 by size ("128x128"), of the thumbnail and the 1024 px photo.

    Raises UserError when it isn't that file.
    """
    try:
        entries = json.loads(Path(json_path).read_bytes())
        expected = {
            int(key): {
                "{}x{}".format(*entry[v]["pixel_size"]): entry[v]["pixel_md5"]
                for v in VERSIONS
                if v in entry
            }
            for key, entry in entries.items()
        }
    except OSError as error:
        raise UserError(f"{json_path} cannot be read ({error.strerror}).") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        expected = {}
    if not expected or not all(expected.values()):
        raise UserError(
            f"{json_path} is not a complete ffhq-dataset-v2.json; its size should be 267,793,842 bytes."
        )
    return expected


if __name__ == "__main__":
    with plain_errors():
        sys.exit(main())
