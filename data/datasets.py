"""The data sets by name, and their split into training and validation images."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data.cifar10 import FIRST_OF_TEST, Cifar10
from data.packed import ImageSet, open_packed
from data.sources import Source, find_source
from functions.support.errors import UserError

DATA_FOLDER = Path(__file__).resolve().parent
EMBEDDED_SET = DATA_FOLDER / "emoji_faces.zip"
FFHQ_SIZE = 70_000

# The last validation images of the full FFHQ by id: the reference run's split and the official one.
FFHQ_VALIDATION = {"reference": 7_000, "official": 10_000}


@dataclass(frozen=True)
class Split:
    """Which images train and which validate: int64 indices into an ImageSet, and hashes of the two lists of ids."""

    train_indices: np.ndarray
    val_indices: np.ndarray
    description: str
    train_ids_hash: str
    val_ids_hash: str


def load_images(dataset_name: str, image_size: int, max_bad_images: int = 0) -> ImageSet:
    """Load all images of a data set at image_size x image_size pixels; they are prepared on first use.

    "emoji_faces" is the embedded set, "emoji_people" the people in it, "FFHQ" whatever copy of FFHQ lies at data/FFHQ,
    "CIFAR10" its binary version at data/CIFAR10; anything else is the path of a folder, .zip or .npz. Raises UserError
    as `find_source`, `Cifar10` and `open_packed` do.
    """
    pack = open_packed(locate(dataset_name, image_size), image_size, max_bad_images)
    if dataset_name == "emoji_people":
        people = [i for i, image_id in enumerate(pack.ids) if image_id.startswith("people_")]
        summary = f"{dataset_name}: {len(people):,} of the images of {pack.summary}"
        return ImageSet(
            dataset_name, pack.images[people], [pack.ids[i] for i in people], summary, pack.path
        )
    return replace(pack, name=dataset_name)


def locate(dataset_name: str, image_size: int) -> Source:
    """Find the source behind a data set's name or path. Raises UserError when there is none."""
    if dataset_name in ("emoji_faces", "emoji_people"):
        return find_source(EMBEDDED_SET, image_size)
    if dataset_name == "FFHQ":
        return find_source(find_ffhq(DATA_FOLDER), image_size, numbered=True)
    if dataset_name == "CIFAR10":
        return Cifar10(DATA_FOLDER / "CIFAR10")
    return find_source(dataset_name, image_size)


def find_ffhq(folder: Path) -> Path:
    """Find the copy of FFHQ in a data folder: a folder FFHQ, an archive in it, or FFHQ.zip or FFHQ.npz beside it."""
    archives_inside = sorted(
        p for p in folder.glob("FFHQ/*") if p.suffix.lower() in (".zip", ".npz") and p.is_file()
    )
    if len(archives_inside) > 1:
        names = ", ".join(path.name for path in archives_inside)
        raise UserError(
            f"{folder / 'FFHQ'} holds {names}. Leave one archive there, or name one as the data set."
        )
    for path in (*archives_inside, folder / "FFHQ", folder / "FFHQ.zip", folder / "FFHQ.npz"):
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            return path
    raise UserError(
        "FFHQ is not there. Get the 128x128 thumbnails (2 GB; python download_ffhq.py --thumbs of "
        "github.com/NVlabs/ffhq-dataset, or a copy from Kaggle or Hugging Face)\n"
        f"and put it at {folder / 'FFHQ'} (a folder, or FFHQ.zip or FFHQ.npz), or name its path as the data set."
    )


def split_images(image_set: ImageSet, split: str) -> Split:
    """Split a set by sorted id. `split` is "reference" or "official".

    The full FFHQ (ids 0 to 69,999): 63,000 / 7,000 as in the reference run, or the official 60,000 / 10,000.
    CIFAR-10: its test images validate.
    Any other set, an incomplete FFHQ included: its last 10%, at least one image, validate.
    Raises UserError when `split` is neither or a side would be empty.
    """
    if split not in FFHQ_VALIDATION:
        raise UserError(
            f"There is no split {split!r}; it can be {' or '.join(map(repr, FFHQ_VALIDATION))}."
        )
    count = len(image_set)
    val_count, which = max(1, count // 10), "not the full FFHQ, so the last 10% by id validate"
    if image_set.ids == list(range(FFHQ_SIZE)):
        val_count, which = FFHQ_VALIDATION[split], f"{split} split of the full FFHQ"
    elif image_set.name == "CIFAR10":
        val_count, which = sum(i >= FIRST_OF_TEST for i in image_set.ids), "its test images"
    train_count = count - val_count
    if train_count < 1:
        raise UserError(
            f"{image_set.name} has {count} image(s): too few to train on some and validate on others."
        )
    description = (
        f"{image_set.name}: {train_count:,} images train, {val_count:,} validate ({which})"
    )
    indices = np.arange(count, dtype=np.int64)
    hashes = hash_ids(image_set.ids[:train_count]), hash_ids(image_set.ids[train_count:])
    return Split(indices[:train_count], indices[train_count:], description, *hashes)


def images_of_run(
    diffusion: dict, image_size: int, name: str | None = None
) -> tuple[ImageSet, Split]:
    """The images that a run was trained and validated on, by its saved config; from elsewhere, or others, by `name`.

    Raises UserError when the config does not say, or as `load_images` does.
    """
    if name:
        diffusion = {"max_bad_images": 0, "split": "reference", **diffusion, "dataset_name": name}
    fields = {"dataset_name": str, "max_bad_images": int, "split": str}
    if any(type(diffusion.get(field)) is not kind for field, kind in fields.items()):
        raise UserError(
            "the model's config does not say which images it was trained on; name some, by evaluate.py --data NAME or "
            "sample.py --calibrate NAME"
        )
    image_set = load_images(diffusion["dataset_name"], image_size, diffusion["max_bad_images"])
    return image_set, split_images(image_set, diffusion["split"])


def hash_ids(ids: list) -> str:
    """Make a short hash of a list of ids, by which two runs can be shown to have used the same images."""
    return hashlib.sha256("\n".join(map(str, ids)).encode(errors="surrogateescape")).hexdigest()[
        :16
    ]
