"""Make a data set of an array or a Dataset of images, for training from Python (docs/python.md)."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from data.packed import CHUNK, ImageArray, ImageSet


class DatasetImages:
    """The images of a torch `Dataset`, read when they are asked for: uint8 (N, S, S, C).

    Its items are images, as arrays (S, S, C) or of Pillow, or pairs of an image and more.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset
        first = self[np.arange(1)]
        self.dtype = first.dtype
        self.shape = (len(dataset), *first.shape[1:])

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        items = [self.dataset[i] for i in indices.tolist()]
        return np.stack([item[0] if isinstance(item, tuple) else item for item in items])


def from_dataset(name: str, dataset: Dataset, **options: Any) -> ImageSet:
    """Return the set of the images of a torch `Dataset`, with the options of `from_array`.

    Its items are images, or pairs (image, inputs), whose inputs are values by name. It is read
    twice here, for the inputs and for the hash, and its images are not kept in memory.
    """
    items = (dataset[i] for i in range(len(dataset)))
    rows = [item[1] for item in items if isinstance(item, tuple)]
    inputs = {key: np.stack([row[key] for row in rows]) for key in rows[0]} if rows else {}
    return from_array(name, DatasetImages(dataset), inputs=inputs, **options)


def from_array(
    name: str,
    images: ImageArray,
    names: Sequence[str] | None = None,
    inputs: dict[str, np.ndarray] | None = None,
    label_names: Sequence[str] = (),
) -> ImageSet:
    """Return the set of the images in an array, uint8 (N, S, S, C), of any number of channels.

    It may be one on a disk, of HDF5 or Zarr, and is read once here for its hash. A tenth is held
    out, by a hash of each of the `names`, by default 0, 1, ... `inputs` are what the network gets
    beside x_t and t, (N, ...) each. One called `label` is an index of `label_names`; the network
    also gets the number of these, which stands for no label (data/labels.py). Raises ValueError
    for arrays of another dtype or shape, and equal names.
    """
    count, *size = images.shape
    if images.dtype != np.uint8 or len(size) != 3 or size[0] != size[1]:
        raise ValueError(
            f"images are {images.dtype} {images.shape}; they must be uint8 (N, S, S, C)"
        )
    names = [*map(str, range(count) if names is None else names)]
    inputs = {key: np.asarray(values) for key, values in (inputs or {}).items()}
    if {count} != {len({*names}), len(names), *map(len, inputs.values())}:
        raise ValueError("each image must have one name of its own, and one of each input")
    if "label" in inputs:
        inputs["label"] = as_indices(inputs["label"], len(label_names))
    return ImageSet(
        name,
        images,
        ids=names,
        names=names,
        rule="name",
        pixels_hash=hash_of(images, inputs),
        summary=f"{name}: {count:,} images at {size[0]}x{size[1]}",
        inputs=inputs,
        label_names=[*label_names],
    )


def as_indices(label: np.ndarray, count: int) -> np.ndarray:
    """Return labels (N,) as int64. Raises ValueError unless they are indices of `count` names."""
    if label.ndim != 1 or label.dtype.kind not in "iu":
        raise ValueError(f"labels are {label.dtype} {label.shape}; they must be integers (N,)")
    if not {*label.tolist()} <= {*range(count)}:
        raise ValueError("labels must be indices of label_names")
    # PyTorch looks up no index of another dtype.
    return label.astype(np.int64)


def hash_of(images: ImageArray, inputs: dict[str, np.ndarray]) -> str:
    """Return a hash of all numbers with which a run must go on. Labels have one of their own."""
    digest = hashlib.sha256()
    for first in range(0, images.shape[0], CHUNK):
        indices = np.arange(first, min(first + CHUNK, images.shape[0]))
        digest.update(np.ascontiguousarray(images[indices]))
    for key, values in sorted(inputs.items()):
        if key != "label":
            digest.update(f"{key} {values.dtype} {values.shape}".encode())
            digest.update(np.ascontiguousarray(values))
    return digest.hexdigest()[:16]
