"""Prepares a data set ahead of training, or checks a copy of FFHQ against its published md5 sums.

    python data/prepare.py FFHQ
    python data/prepare.py path/to/folder-or-zip-or-npz --image-size 64
    python data/prepare.py FFHQ --verify ffhq-dataset-v2.json

train.py prepares by itself what is not prepared yet. With --verify the images are checked first, and prepared only when
every one is right. Exit code: 0 fine, 1 the verification found differences, 2 the data cannot be used.
"""

import argparse
import sys
from pathlib import Path

# Run as a script, Python looks for modules in this folder, not in the repository's root where `data` lies.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.datasets import load_images, locate
from data.verify import Verification, verify_pixels
from functions.support.errors import UserError

LISTED = 20  # of each kind of difference


def print_verification(result: Verification) -> None:
    """Prints how many images are right, and the first of those that are wrong, missing or extra."""
    print(
        f"{result.correct:,} correct, {len(result.wrong):,} wrong, {len(result.missing):,} missing, "
        f"{len(result.extra):,} extra"
    )
    lines = {
        "wrong": [f"{name}: {reason}" for name, reason in result.wrong],
        "missing": [f"id {image_id}" for image_id in result.missing],
        "extra": [f"id {image_id}" for image_id in result.extra],
    }
    for kind, listed in lines.items():
        for line in listed[:LISTED]:
            print(f"  {kind}: {line}")
        if len(listed) > LISTED:
            print(f"  {kind}: ... and {len(listed) - LISTED:,} more")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "source", metavar="SOURCE", help="FFHQ, emoji_faces, emoji_people, or the path of a folder or archive"
    )
    parser.add_argument("--image-size", type=int, default=128, metavar="S", help="pixels, default 128")
    parser.add_argument("--max-bad-images", type=int, default=0, metavar="N", help="so many may be left out, default 0")
    parser.add_argument("--verify", metavar="JSON", help="ffhq-dataset-v2.json, to check every image against")
    options = parser.parse_args(arguments)
    if options.max_bad_images < 0:
        parser.error(f"argument --max-bad-images: {options.max_bad_images} is below 0")
    try:
        if options.verify:
            result = verify_pixels(locate(options.source, options.image_size), options.verify)
            print_verification(result)
            if not result.is_clean:
                return 1
        print(f"Ready: {load_images(options.source, options.image_size, options.max_bad_images).summary}")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing is left half-written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":  # needed, not custom: the decoding processes import this file again
    sys.exit(main())
