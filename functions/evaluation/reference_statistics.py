"""What generated images are compared with: features of real images, made once, kept under a hash, and publishable.

A file is a NumPy archive without pickles:
    description    JSON: all that the numbers were made from
    mu, sigma      (D,) and (D, D) float64, for FID
    features       (N, D) float32, for KID, precision and recall; in the cache alone, for it can be large
"""

import hashlib
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from functions.evaluation.features import Extractor, statistics
from functions.support.errors import UserError
from functions.support.files import READ_ERRORS, short, write_whole
from functions.support.processes import SINGLE_PROCESS, Processes

FORMAT = "ddpm-faces reference statistics 1"
TEXTS = ("dataset", "split", "ids_hash", "pixels_hash", "extractor", "weights_hash")  # of a description
CHUNK = 1024  # images hashed at a time


@dataclass(frozen=True)
class Reference:
    """Real images as the metrics see them."""

    description: dict
    statistics: dict  # mu, sigma
    features: Tensor | None = None  # (N, D) float32; None out of a published file


def describe(
    images: np.ndarray, indices: np.ndarray, ids_hash: str, dataset: str, split: str, extractor: Extractor
) -> dict:
    """All that a reference's features follow from, as plain values: the pixels, in this order, and the network."""
    pixels = hashlib.sha256()
    for start in range(0, len(indices), CHUNK):
        pixels.update(np.ascontiguousarray(images[indices[start : start + CHUNK]]))
    return {
        "dataset": dataset, "split": split, "count": len(indices), "image_size": int(images.shape[1]),
        "ids_hash": ids_hash, "pixels_hash": pixels.hexdigest()[:16], **of_extractor(extractor),
    }  # fmt: skip


def of_extractor(extractor: Extractor) -> dict:
    return {"extractor": extractor.name, "weights_hash": extractor.weights_hash}


def cached_reference(
    cache: Path, description: dict, make_features: Callable[[], Tensor], processes: Processes = SINGLE_PROCESS
) -> Reference | None:
    """The reference of a description: out of the cache, or made by all processes and put there; None but in rank 0."""
    key = hashlib.sha256(json.dumps([FORMAT, description], sort_keys=True).encode()).hexdigest()
    path = cache / f"{description['split']}-{key[:16]}.npz"
    found = read_if_whole(path, description) if processes.is_main else None
    if processes.any(found is not None):
        return found
    features = make_features()
    if not processes.is_main:
        return None
    made = Reference(description, statistics(features), features)
    cache.mkdir(parents=True, exist_ok=True)
    write_reference(path, made, with_features=True)
    return made


def read_if_whole(path: Path, description: dict) -> Reference | None:
    """A file of the cache; None when there is none, or it is damaged: it is made anew then."""
    try:
        found = read_reference(path)
    except UserError:
        return None
    return found if found.description == description and found.features is not None else None


def write_reference(path: Path, reference: Reference, with_features: bool = False) -> None:
    """Write the file; without features for publishing."""
    if path.suffix != ".npz":
        raise UserError(f"{path}: the name of a file with reference statistics must end in .npz")
    arrays = dict(reference.statistics)
    if with_features:
        arrays["features"] = reference.features.numpy()
    description = json.dumps({"format": FORMAT, **reference.description})
    write_whole(path, lambda file: np.savez(file, description=np.array(description), **arrays))


def read_reference(path: Path) -> Reference:
    """The inverse of `write_reference`.

    Raises:
        UserError: the file is missing, damaged, empty, or not one of ours.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file with reference statistics")
    try:
        with zipfile.ZipFile(path) as archive:  # which compares checksums as it reads
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > path.stat().st_size:
            raise UserError(f"{path}: the file would unpack to more than it is, as no file of ours does")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        description = json.loads(str(arrays.pop("description")))
        if description.pop("format") != FORMAT:
            raise KeyError("format")
        mu, sigma, features = arrays["mu"], arrays["sigma"], arrays.get("features")
        width, count, size = len(mu), description["count"], description["image_size"]
        texts = [description[name] for name in TEXTS]
    except UserError:
        raise
    except READ_ERRORS as error:
        raise UserError(
            f"{path}: damaged, or not a file of reference statistics of evaluate.py ({short(error)})"
        ) from error
    fits = (mu.shape, sigma.shape) == ((width,), (width, width)) and mu.dtype == sigma.dtype == np.float64
    plain = all(type(value) is int for value in (count, size)) and all(text == short(text) for text in texts)
    if not fits or not plain:
        raise UserError(f"{path}: its statistics have other shapes or types than they should")
    if count < 2 or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(f"{path}: an empty reference ({count} images), or numbers that are not finite")
    if features is not None:
        if features.shape != (count, width) or features.dtype != np.float32:
            raise UserError(f"{path}: its features have other shapes or types than they should")
        features = torch.from_numpy(features)
    return Reference(description, {"mu": mu, "sigma": sigma}, features)


def published_reference(path: Path, image_size: int, extractor: Extractor) -> Reference:
    """A file that somebody published, for models of this size and this network.

    Raises:
        UserError: as `read_reference`; it is of images of another size, or was made with another network.
    """
    found = read_reference(path)
    for name, own in {"image_size": image_size, **of_extractor(extractor)}.items():
        if found.description[name] != own:
            raise UserError(f"{path}: made with {name} = {short(found.description[name])}; here it is {own}")
    return found
