"""Make a data set of an array of images, for training from Python (docs/python.md)."""

import hashlib
from collections.abc import Sequence

import numpy as np

from data.packed import ImageSet


def from_array(
    name: str,
    images: np.ndarray,
    names: Sequence[str] | None = None,
    inputs: dict[str, np.ndarray] | None = None,
    label_names: Sequence[str] = (),
) -> ImageSet:
    """Return the set of the images in an array, uint8 (N, S, S, C), of any number of channels.

    A tenth is held out, by a hash of each of the `names`, by default 0, 1, ... `inputs` are
    what the network gets beside x_t and t, (N, ...) each. One called `label` is an index of
    `label_names`; the network also gets the number of these, which stands for no label
    (data/labels.py). Raises ValueError for arrays of another dtype or shape, and equal names.
    """
    square = images.ndim == 4 and images.shape[1] == images.shape[2]
    if images.dtype != np.uint8 or not square:
        raise ValueError(
            f"images are {images.dtype} {images.shape}; they must be uint8 (N, S, S, C)"
        )
    names = [*map(str, range(len(images)) if names is None else names)]
    inputs = {name: np.asarray(values) for name, values in (inputs or {}).items()}
    if {len(images)} != {len({*names}), len(names), *map(len, inputs.values())}:
        raise ValueError("each image must have one name of its own, and one of each input")
    if "label" in inputs:
        label = inputs["label"]
        if label.ndim != 1 or label.dtype.kind not in "iu":
            raise ValueError(f"labels are {label.dtype} {label.shape}; they must be integers (N,)")
        if not {*label.tolist()} <= {*range(len(label_names))}:
            raise ValueError("labels must be indices of label_names")
        # PyTorch looks up no index of another dtype.
        inputs["label"] = label.astype(np.int64)
    # A run goes on only with the same numbers. Labels have a hash of their own.
    digest = hashlib.sha256(np.ascontiguousarray(images))
    for key, values in sorted(inputs.items()):
        if key != "label":
            digest.update(f"{key} {values.dtype} {values.shape}".encode())
            digest.update(np.ascontiguousarray(values))
    summary = f"{name}: {len(images):,} images at {images.shape[1]}x{images.shape[2]}"
    return ImageSet(
        name,
        images,
        ids=names,
        names=names,
        rule="name",
        pixels_hash=digest.hexdigest()[:16],
        summary=summary,
        inputs=inputs,
        label_names=[*label_names],
    )
