"""Statistics of real images that FID compares with, in a file to publish.

Whoever has the file does not need the images. It is a NumPy archive of plain arrays:
    description    JSON: all that the numbers were made from
    mu, sigma      (D,) and (D, D) float64
"""

import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np

from data.datasets import ImageSet, hash_ids
from functions.evaluation.features import Extractor, Reference
from functions.sampling.generation import batches_of
from functions.support.errors import UserError
from functions.support.files import READ_ERRORS, short, write_whole

FORMAT = "ddpm-faces reference statistics 1"
# These fields of a description are texts.
TEXTS = ("dataset", "split", "ids_hash", "pixels_hash", "extractor", "weights_hash")
# So many images are hashed at a time.
CHUNK = 1024
# A damaged file raises one of these. MemoryError comes from a header that lies about a shape.
BROKEN = (*READ_ERRORS, MemoryError)


def describe(image_set: ImageSet, indices: np.ndarray, split: str, extractor: Extractor) -> dict:
    """Return all that a reference's features follow from, as plain values.

    That is the pixels of these images, in this order, and the network.
    """
    images = image_set.images
    pixels = hashlib.sha256()
    for chunk in batches_of(indices, CHUNK):
        pixels.update(images[chunk])
    return {
        # The path is left out: it may tell of its owner, and the pixels have their hash.
        "dataset": Path(image_set.name).name,
        "split": split,
        "count": len(indices),
        "image_size": images.shape[1],
        "ids_hash": hash_ids([image_set.ids[i] for i in indices]),
        "pixels_hash": pixels.hexdigest()[:16],
        **extractor.facts,
    }


def write_reference(path: Path, reference: Reference) -> None:
    """Write the statistics, to publish."""
    description = json.dumps({"format": FORMAT, **reference.description})
    write_whole(path, lambda file: np.savez(file, description=description, **reference.statistics))


def read_reference(path: Path, image_size: int, extractor: Extractor) -> Reference:
    """Read a file that somebody published, for models of this size and this network.

    Raises `UserError` when it is missing, damaged, empty, not one of ours, or of other images or
    another network.
    """
    try:
        # `zipfile` compares checksums as it reads. The arrays are not compressed, so a file that
        # would unpack to more than its own size is none of ours.
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > path.stat().st_size:
            raise ValueError("it would unpack to more than it is")

        # By default NumPy reads plain arrays alone, so no code in the file is run.
        with np.load(path) as file:
            arrays = dict(file)
        description = json.loads(str(arrays.pop("description")))
        if description.pop("format") != FORMAT:
            raise ValueError("another format")
        mu = arrays["mu"]
        sigma = arrays["sigma"]
        check_statistics(description, mu, sigma)
    except BROKEN as error:
        raise UserError(f"{path}: no sound reference statistics ({short(error)})") from error

    found = {**description, "features": len(mu)}
    expected = {"image_size": image_size, **extractor.facts, "features": extractor.width}
    for name, value in expected.items():
        if found[name] != value:
            raise UserError(f"{path}: made with {name} = {short(found[name])}; here it is {value}")
    return Reference(description, {"mu": mu, "sigma": sigma})


def check_statistics(description: dict, mu: np.ndarray, sigma: np.ndarray) -> None:
    """Raise one of `BROKEN` unless shapes and types are right and all numbers are finite."""
    width = len(mu)
    count = description["count"]
    size = description["image_size"]
    texts = [description[name] for name in TEXTS]

    # `short` changes a text that is too long, or that has control characters for a terminal.
    plain = type(count) is type(size) is int and all(text == short(text) for text in texts)
    shapes_fit = mu.shape == (width,) and sigma.shape == (width, width)
    types_fit = mu.dtype == sigma.dtype == np.float64
    finite = np.isfinite(mu).all() and np.isfinite(sigma).all()
    if not (plain and count >= 2 and shapes_fit and types_fit and finite):
        raise ValueError("its texts, shapes or numbers are not those of two images or more")
