"""Load data sets by name, and split them into training and validation images."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data.labels import read_labels
from data.packed import ImageSet, open_packed
from data.sources import Source, choose_ids, find_source
from functions.support.errors import UserError, door, printable
from functions.support.files import sha256

DATA_FOLDER = Path(__file__).resolve().parent
EMBEDDED_SET = DATA_FOLDER / "emoji_faces.zip"

# Of a set without a rule of its own, this fraction is held out.
HELD_OUT = 0.1

# What the hashes of a split, which a run saves, tell of the run.
TOLD_BY = {
    "labels_hash": "trained with other labels",
    "train_ids_hash": "trained on other images or in another order",
    "val_ids_hash": "validated on other images or in another order",
    "pixels_hash": "trained on other pixels or inputs",
}


@dataclass(frozen=True)
class Split:
    """A split of an ImageSet: int64 indices, and in words the rule that decides it."""

    train_indices: np.ndarray
    val_indices: np.ndarray
    rule: str
    description: str
    # By the keys of TOLD_BY. The hash of pixels is that of the whole set, and that of labels is ""
    # without any.
    hashes: dict[str, str]

    def differences(self, saved: Mapping[str, str]) -> list[str]:
        """Return in words what a run with these `saved` hashes had in another way."""
        # Two models of the box have no hash of labels, nor of ids for validation.
        return [TOLD_BY[key] for key, own in self.hashes.items() if saved.get(key, own) != own]


def load_images(
    dataset_name: str,
    image_size: int,
    max_bad_images: int = 0,
    channels: int = 3,
    labels: bool = False,
) -> ImageSet:
    """Load all images of a data set at image_size x image_size pixels, prepared on first use.

    The embedded set is "emoji_faces"; "emoji_people" are the people in it. "FFHQ", "CIFAR10" and
    "MNIST" are in data/. Any other name is a path. With `labels`, each image has its label. Raises
    UserError or OSError.
    """
    source = locate(dataset_name)
    pack = open_packed(source, (channels, image_size, image_size), max_bad_images)
    if dataset_name == "emoji_people":
        # The people share the packed file of the whole embedded set.
        indices = [i for i, image_id in enumerate(pack.ids) if image_id.startswith("people_")]
        ids = [pack.ids[i] for i in indices]
        summary = f"{dataset_name}: {len(ids):,} of the images of {pack.summary}"
        pack = replace(pack, images=pack.images[indices], ids=ids, names=ids, summary=summary)
    pack = replace(pack, name=dataset_name)
    if not labels:
        return pack
    found = [source.members[image_id].label for image_id in pack.ids]
    label, names, counts = read_labels(dataset_name, pack.names, found)
    summary = f"{pack.summary}; {counts}"
    return replace(pack, summary=summary, inputs={"label": label}, label_names=names)


def locate(dataset_name: str) -> Source:
    """Find the source for a data set's name or path."""
    if dataset_name in ("emoji_faces", "emoji_people"):
        return find_source(EMBEDDED_SET, "id")
    if dataset_name == "FFHQ":
        # There may be an empty folder next to a zip, so the zip comes first.
        paths = [DATA_FOLDER / "FFHQ.zip", DATA_FOLDER / "FFHQ"]
        found = [path for path in paths if path.exists()]
        if not found:
            raise UserError(
                f"FFHQ was not found at {paths[1]} (a folder, or {paths[0].name}, or a link to "
                "one); docs/ffhq.md says where to get it"
            )
        source = find_source(found[0], "FFHQ")
        if isinstance(min(source.members), str):
            raise UserError(
                f"{source.path}: each image of FFHQ must have a number of its own as its name. "
                "Remove other images and second copies."
            )
        return source
    if dataset_name in ("CIFAR10", "MNIST"):
        return read_torchvision_set(dataset_name)
    return find_source(dataset_name)


def read_torchvision_set(name: str, download: bool = False) -> Source:
    """Read CIFAR10 or MNIST in data/ by extras/, which can download it. Raises UserError."""
    with door(name):
        import extras.torchvision_sets as sets
    return sets.read_set(name, DATA_FOLDER, download)


def hold_out(image_set: ImageSet, split: str) -> tuple[np.ndarray, str]:
    """Return which images of a set are held out, bool (N,), and in words the rule that says so.

    `split`, for FFHQ, is "reference" or "official".

    - "FFHQ": ids from 63,000 on are held out, or from 60,000 on with "official". A part of FFHQ
      with images on only one side is split as by "id".
    - "id": the last tenth by id is held out, but at least one image.
    - "name": an image is held out if the hash of its file's name, without folders, is below
      HELD_OUT, or the lowest. So it stays on its side, whatever is added to the set.
    - Otherwise, images on the side of this name are held out, as `find_source` has decided.
    """
    ids = image_set.ids
    rule = image_set.rule
    count = len(ids)
    first = 60_000 if split == "official" else 63_000
    if rule == "FFHQ" and ids[0] < first <= ids[-1]:
        return np.array(ids) >= first, f"FFHQ's ids from {first:,} on"
    if rule in ("FFHQ", "id"):
        return np.arange(count) >= count - max(1, count // 10), "the last 10% by id"
    if rule == "name":
        files = [name.rpartition("/")[2] for name in image_set.names]
        hashes = np.array([int(sha256(file)[:8], 16) / 16**8 for file in files])
        return hashes <= max(HELD_OUT, hashes.min()), "by a hash of each name"
    return np.array(image_set.sides) == rule, f"its {rule} images"


def split_images(image_set: ImageSet, split: str) -> Split:
    """Split a set as `hold_out` says. Raises UserError when a side has no image."""
    held_out, reason = hold_out(image_set, split)
    names = image_set.names
    train_indices = np.flatnonzero(~held_out)
    val_indices = np.flatnonzero(held_out)
    name = printable(image_set.name)
    counts = f"{name}: {len(train_indices):,} images train, {len(val_indices):,} validate"
    why = f"({held_out.mean():.1%}, {reason})"
    if held_out.all() or not held_out.any():
        raise UserError(
            f"{counts} {why}: too few; folders train/ and val/ can say which image is which"
        )
    # A file that cannot be read has an id, too, and makes all ids names if it has no number.
    own_ids = choose_ids(names)
    labels = image_set.inputs.get("label", np.empty(0)).tolist()
    hashes = {
        "labels_hash": hash_ids([*image_set.label_names, *labels]) if labels else "",
        "train_ids_hash": hash_ids([own_ids[i] for i in train_indices]),
        "val_ids_hash": hash_ids([own_ids[i] for i in val_indices]),
        "pixels_hash": image_set.pixels_hash,
    }
    examples = ", ".join(printable(names[i]) for i in val_indices[:3])
    description = f"{counts} {why}, such as {examples}"
    return Split(train_indices, val_indices, reason, description, hashes)


def hash_ids(ids: list) -> str:
    """Return a short hash of a list of ids, to show that two runs used the same images."""
    return sha256("\n".join(map(str, ids)))[:16]
