"""Statistics of real images that FID compares with, in a file to publish: nobody needs the images then.

It is a NumPy archive of plain arrays:
    description    JSON: all that the numbers were made from
    mu, sigma      (D,) and (D, D) float64
"""

import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np

from functions.evaluation.features import Extractor, Reference
from functions.support.errors import UserError
from functions.support.files import READ_ERRORS, short, write_whole

FORMAT = "ddpm-faces reference statistics 1"
# Of a description
TEXTS = ("dataset", "split", "ids_hash", "pixels_hash", "extractor", "weights_hash")
CHUNK = 1024  # images hashed at a time
# The last: a header that lies about a shape
BROKEN = (*READ_ERRORS, EOFError, zipfile.BadZipFile, MemoryError)


def describe(
    images: np.ndarray,
    indices: np.ndarray,
    ids_hash: str,
    dataset: str,
    split: str,
    extractor: Extractor,
) -> dict:
    """All that a reference's features follow from, as plain values: the pixels, in this order, and the network."""
    pixels = hashlib.sha256()
    for start in range(0, len(indices), CHUNK):
        pixels.update(np.ascontiguousarray(images[indices[start : start + CHUNK]]))
    images_of = {
        "dataset": dataset,
        "split": split,
        "count": len(indices),
        "image_size": int(images.shape[1]),
    }
    return {
        **images_of,
        "ids_hash": ids_hash,
        "pixels_hash": pixels.hexdigest()[:16],
        **extractor.facts,
    }


def write_reference(path: Path, reference: Reference) -> None:
    """Write the statistics, to publish."""
    description = np.array(json.dumps({"format": FORMAT, **reference.description}))
    write_whole(path, lambda file: np.savez(file, description=description, **reference.statistics))


def read_reference(path: Path, image_size: int, extractor: Extractor) -> Reference:
    """Read a file that somebody published, for models of this size and this network.

    `UserError` when it is missing, damaged, empty, not one of ours, or of other images or another network.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # which compares checksums as it reads
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > path.stat().st_size:
            raise ValueError("it would unpack to more than it is")
        with np.load(path) as file:  # plain arrays alone, by NumPy's default
            arrays = {name: file[name] for name in file.files}
        description = json.loads(str(arrays.pop("description")))
        if description.pop("format") != FORMAT:
            raise ValueError("another format")
        mu, sigma = arrays["mu"], arrays["sigma"]
        width, count, size = len(mu), description["count"], description["image_size"]
        texts = [description[name] for name in TEXTS]
        plain = type(count) is type(size) is int and all(text == short(text) for text in texts)
        fits = (mu.shape, sigma.shape, mu.dtype, sigma.dtype) == (
            (width,),
            (width, width),
            np.float64,
            np.float64,
        )
        if not (plain and fits):
            raise ValueError("it has other shapes or types than it should")
        if count < 2 or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise ValueError(f"an empty reference ({count} images), or numbers that are not finite")
    except BROKEN as error:
        raise UserError(f"{path}: no sound reference statistics ({short(error)})") from error
    inside = {**description, "features": width}
    for name, own in {
        "image_size": image_size,
        **extractor.facts,
        "features": extractor.width,
    }.items():
        if inside[name] != own:
            raise UserError(f"{path}: made with {name} = {short(inside[name])}; here it is {own}")
    return Reference(description, {"mu": mu, "sigma": sigma})
