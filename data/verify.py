"""Checking a copy of FFHQ against the md5 sums in ffhq-dataset-v2.json."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from functions.support.errors import UserError

from .decode import BadImage
from .reading import map_images
from .sources import Source

# The json describes every photo at these sizes. pixel_md5 is over the raw pixels, so it also fits re-encoded lossless
# copies; JPEGs and resized copies never match.
VERSIONS = ("thumbnail", "image")


@dataclass(frozen=True)
class Verification:
    """What differs from the json: [name, reason] of wrong images, ids missing from the source, ids it has besides."""

    correct: int
    wrong: list
    missing: list
    extra: list

    @property
    def is_clean(self) -> bool:
        return not (self.wrong or self.missing or self.extra)


def verify_pixels(source: Source, json_path: str | Path, quiet: bool = False) -> Verification:
    """Compares the pixel_md5 of every image of a source, at its own size, with the json's thumbnail or 1024 px entry.

    Raises UserError when the json cannot be read or is another file, or when the source's images aren't numbered.
    """
    expected = read_expected(json_path)
    if not all(isinstance(image_id, int) for image_id in source.ids):
        raise UserError(f"{source.path}: the images have no numbers by which {json_path} could be compared.")
    correct, wrong = 0, []
    results = map_images(source, _pixel_md5)
    for position, result in enumerate(
        tqdm(results, total=len(source.ids), desc="Verifying", unit="img", disable=quiet, delay=1.0)
    ):
        image_id = source.ids[position]
        # In an npz the images have no names of their own.
        name = source.members[position].name if source.kind != "npz" else f"image {image_id}"
        if isinstance(result, BadImage):
            wrong.append([name, str(result)])
        elif image_id in expected:
            size, md5 = result
            if size not in expected[image_id]:
                wanted = " or ".join(f"{width}x{height}" for width, height in expected[image_id])
                wrong.append([name, f"is {size[0]}x{size[1]}, not {wanted}"])
            elif md5 != expected[image_id][size]:
                wrong.append([name, f"pixel_md5 is {md5}, not {expected[image_id][size]}"])
            else:
                correct += 1
    ids = set(source.ids)
    return Verification(correct, wrong, missing=sorted(expected.keys() - ids), extra=sorted(ids - expected.keys()))


def read_expected(json_path: str | Path) -> dict[int, dict[tuple[int, int], str]]:
    """ffhq-dataset-v2.json -> by id, the pixel_md5 by (width, height). Raises UserError when it isn't that file."""

    def keep_sums(entry: dict) -> dict:
        # The file takes 268 MB and several times that in memory; all but the sums is dropped as soon as it is read.
        if "pixel_md5" in entry:
            return {key: entry[key] for key in ("pixel_md5", "pixel_size")}
        if "thumbnail" in entry:
            return {key: entry[key] for key in VERSIONS if key in entry}
        return entry if all(key.isdecimal() for key in entry) else {}

    try:
        with open(json_path, encoding="utf-8") as file:
            entries = json.load(file, object_hook=keep_sums)
        expected = {
            int(key): {tuple(version["pixel_size"]): version["pixel_md5"] for version in entry.values()}
            for key, entry in entries.items()
        }
    except OSError as error:
        raise UserError(f"{json_path} cannot be read ({error.strerror}).") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        expected = {}
    if not expected or not all(expected.values()):
        raise UserError(f"{json_path} is not a complete ffhq-dataset-v2.json; its size should be 267,793,842 bytes.")
    return expected


def _pixel_md5(rgb: np.ndarray) -> tuple[tuple[int, int], str]:
    height, width = rgb.shape[:2]
    return (width, height), hashlib.md5(rgb.tobytes(), usedforsecurity=False).hexdigest()
