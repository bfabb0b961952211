"""Labels of images: each is an index of the list of all their names.

The network gets it as its argument `label`, and the length of the list stands for no label.
"""

from collections.abc import Sequence
from math import inf

import numpy as np

from functions.support.errors import UserError, printable


def read_labels(
    dataset_name: str, images: Sequence[str], labels: Sequence[str | None]
) -> tuple[np.ndarray, list[str], str]:
    """Return the label of each image (N,), the names of all labels, and a summary in words.

    `images` are the names of the N images, and `labels` those of their `Member`s. Raises UserError
    for an image without one, and for fewer than two labels.
    """
    dataset = printable(dataset_name)
    if None in labels:
        without = printable(images[labels.index(None)])
        raise UserError(
            f"{dataset} has no label for {without}: folders are labels, or the column label of a "
            "parquet file; FFHQ has none"
        )
    # Numbers are sorted as such.
    names = sorted({*labels}, key=lambda name: (int(name) if name.isdecimal() else inf, name))
    if len(names) < 2:
        raise UserError(f"{dataset} has one label, {printable(names[0])}; two are needed")
    indices = {name: index for index, name in enumerate(names)}
    label = np.array([indices[name] for name in labels])
    counts = sorted(np.bincount(label))
    summary = f"{len(names)} labels of {counts[0]:,} to {counts[-1]:,} images"
    return label, names, summary


def check_labels(
    dataset_name: str, label: np.ndarray, names: Sequence[str], trained: np.ndarray
) -> None:
    """Raise UserError for labels (N,) that a run cannot learn from images with these indices."""
    dataset = printable(dataset_name)
    unseen = [name for index, name in enumerate(names) if index not in label[trained]]
    if unseen:
        raise UserError(
            f"{dataset}: no training image has the label {printable(unseen[0])!r}, as all with it "
            "are held out; add images of it, or let folders train/ and val/ decide"
        )
