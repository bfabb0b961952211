"""Write and read files with the statistics of real images, for FID.

With such a file others can compute FID without the images. It is a NumPy archive of these arrays:
    description    JSON: the images and the network, see `describe`
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
from functions.support.files import READ_ERRORS, short, write_atomically

FORMAT = "ddpm-faces reference statistics 1"
# The fields of a description that are strings.
STRING_FIELDS = ("dataset", "split", "ids_hash", "pixels_hash", "extractor", "weights_hash")
# This many images are read and hashed at a time.
CHUNK = 1024
# The errors that reading a damaged file can raise. A wrong shape in a header raises MemoryError.
DAMAGE_ERRORS = (*READ_ERRORS, MemoryError)


def describe(image_set: ImageSet, indices: np.ndarray, split: str, extractor: Extractor) -> dict:
    """Return a description of the images at the indices and of the network, as plain values.

    It determines the features, because it has hashes of the pixels, in this order, and of the
    network's weights.
    """
    images = image_set.images
    pixels = hashlib.sha256()
    for chunk in batches_of(indices, CHUNK):
        pixels.update(images[chunk])
    return {
        # A path may reveal who owns the data, so only its last part is published. `read_reference`
        # refuses names that are long or that a terminal cannot show.
        "dataset": short(Path(image_set.name).name)[:200],
        "split": split,
        "count": len(indices),
        "image_size": images.shape[1],
        "ids_hash": hash_ids([image_set.ids[i] for i in indices]),
        "pixels_hash": pixels.hexdigest()[:16],
        **extractor.facts,
    }


def write_reference(path: Path, reference: Reference) -> None:
    """Write the reference's statistics to a file that `read_reference` can read."""
    description = json.dumps({"format": FORMAT, **reference.description})
    write_atomically(
        path, lambda file: np.savez(file, description=description, **reference.statistics)
    )


def read_reference(path: Path, image_size: int, extractor: Extractor) -> Reference:
    """Read published statistics for images of this size and features of this network.

    Raises `UserError` when the file is missing, damaged or in another format, when its images have
    another size, or when its features are from another network.
    """
    try:
        # `write_reference` does not compress. So a file that unpacks to more than its own size was
        # written by something else, and could fill the memory.
        with zipfile.ZipFile(path) as archive:
            unpacked_size = sum(member.file_size for member in archive.infolist())
        if unpacked_size > path.stat().st_size:
            raise ValueError("it would unpack to more than its own size")

        # By default NumPy refuses pickled objects, so no code in the file is run. Reading checks
        # the checksums of the archive.
        with np.load(path) as file:
            arrays = dict(file)
        description = json.loads(str(arrays.pop("description")))
        if description.pop("format") != FORMAT:
            raise ValueError("another format")
        mu = arrays["mu"]
        sigma = arrays["sigma"]
        check_statistics(description, mu, sigma)
    except DAMAGE_ERRORS as error:
        raise UserError(f"{path}: no valid reference statistics ({short(error)})") from error

    actual = {**description, "features": len(mu)}
    expected = {"image_size": image_size, **extractor.facts, "features": extractor.width}
    for name, value in expected.items():
        if actual[name] != value:
            raise UserError(
                f"{path} was made with {name} = {short(actual[name])}; here it is {value}"
            )
    return Reference(description, {"mu": mu, "sigma": sigma})


def check_statistics(description: dict, mu: np.ndarray, sigma: np.ndarray) -> None:
    """Raise one of `DAMAGE_ERRORS` unless types and shapes are right and values finite."""
    width = len(mu)
    count = description["count"]
    size = description["image_size"]
    strings = [description[name] for name in STRING_FIELDS]

    # `short` changes strings that are too long to print, or that contain control characters.
    plain = type(count) is type(size) is int and all(text == short(text) for text in strings)
    shapes_fit = mu.shape == (width,) and sigma.shape == (width, width)
    types_fit = mu.dtype == sigma.dtype == np.float64
    finite = np.isfinite(mu).all() and np.isfinite(sigma).all()
    if not (plain and count >= 2 and shapes_fit and types_fit and finite):
        raise ValueError("its strings, shapes or values are not those of two or more images")
