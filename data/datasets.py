"""Load data sets by name, and split them into training and validation images."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data.packed import ImageSet, open_packed
from data.sources import ARCHIVES, Source, find_source
from data.torchvision_sets import FILES, read_torchvision_set
from functions.support.errors import UserError
from functions.support.files import sha256, short

DATA_FOLDER = Path(__file__).resolve().parent
EMBEDDED_SET = DATA_FOLDER / "emoji_faces.zip"
EMBEDDED_NAMES = ("emoji_faces", "emoji_people")


@dataclass(frozen=True)
class Split:
    """A split of an ImageSet into training and validation images.

    The indices are int64. Each hash of ids is `hash_ids` of the ids of one part. The hash of pixels
    is that of the whole ImageSet.
    """

    train_indices: np.ndarray
    val_indices: np.ndarray
    description: str
    train_ids_hash: str
    val_ids_hash: str
    pixels_hash: str


def load_images(
    dataset_name: str, image_size: int, max_bad_images: int = 0, channels: int = 3
) -> ImageSet:
    """Load all images of a data set at image_size x image_size pixels, prepared on first use.

    "emoji_faces" is the embedded set, and "emoji_people" are the people in it. "FFHQ" is the copy
    that `find_ffhq` finds. "CIFAR10" and "MNIST" are read by `read_torchvision_set`. Any other name
    is a path for `find_source`. Raises UserError as these functions and `open_packed` do.
    """
    source = locate(dataset_name)
    source.channels = channels
    pack = open_packed(source, image_size, max_bad_images)
    if dataset_name == "emoji_people":
        # The people share the packed file of the whole embedded set.
        indices = [i for i, image_id in enumerate(pack.ids) if image_id.startswith("people_")]
        ids = [pack.ids[i] for i in indices]
        summary = f"{dataset_name}: {len(ids):,} of the images of {pack.summary}"
        pack = replace(pack, images=pack.images[indices], ids=ids, summary=summary)
    return replace(pack, name=dataset_name)


def locate(dataset_name: str) -> Source:
    """Find the source for a data set's name or path. Raises UserError when there is none."""
    if dataset_name in EMBEDDED_NAMES:
        return find_source(EMBEDDED_SET)
    if dataset_name == "FFHQ":
        source = find_source(find_ffhq())
        if isinstance(source.ids[0], str):
            raise UserError(
                f"{source.path}: each image of FFHQ must have a number of its own as its name. "
                "Remove other images and second copies."
            )
        return source
    if dataset_name in FILES:
        return read_torchvision_set(dataset_name, DATA_FOLDER)
    return find_source(dataset_name)


def find_ffhq() -> Path:
    """Find the copy of FFHQ in data/: an archive, or the folder FFHQ.

    Raises UserError when there is no copy.
    """
    archives = [f"FFHQ{suffix}" for suffix in ARCHIVES]
    # There may be an empty folder next to an archive, so archives come first.
    for path in map(DATA_FOLDER.joinpath, [*archives, "FFHQ"]):
        if path.exists():
            return path
    raise UserError(
        "FFHQ was not found. Get the 128x128 thumbnails (2 GB; python download_ffhq.py --thumbs of "
        "github.com/NVlabs/ffhq-dataset, or a copy from Kaggle or Hugging Face)\n"
        f"and put it at {DATA_FOLDER / 'FFHQ'} (a folder, or {' or '.join(archives)}), or name its "
        "path as the data set."
    )


def split_images(image_set: ImageSet, split: str) -> Split:
    """Split a set by sorted id. `split` is "reference" or "official".

    A set with test images validates on these. With "official", a set with the ids of the full FFHQ
    (0 to 69,999) is split into 60,000 and 10,000. Any other set validates on its last 10%, but on
    at least one image; for the full FFHQ these are the 7,000 of the reference run. Raises UserError
    when no image is left for training.
    """
    ids = image_set.ids
    count = len(ids)
    if image_set.test_count:
        val_count = image_set.test_count
        reason = "its test images"
    elif split == "official" and ids == list(range(70_000)):
        val_count = 10_000
        reason = "official split of the full FFHQ"
    else:
        val_count = max(1, count // 10)
        reason = "the last 10% by id"

    train_count = count - val_count
    name = short(image_set.name)
    if train_count < 1:
        raise UserError(
            f"{name} has {count} image(s): too few to train on some and validate on others."
        )
    indices = np.arange(count, dtype=np.int64)
    return Split(
        indices[:train_count],
        indices[train_count:],
        f"{name}: {train_count:,} images train, {val_count:,} validate ({reason})",
        hash_ids(ids[:train_count]),
        hash_ids(ids[train_count:]),
        image_set.pixels_hash,
    )


def hash_ids(ids: list) -> str:
    """Return a short hash of a list of ids, to show that two runs used the same images."""
    return sha256("\n".join(map(str, ids)))[:16]
