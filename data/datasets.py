"""Load data sets by name, and split them into training and validation images."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data.cifar10 import Cifar10
from data.mnist import Mnist
from data.packed import ImageSet, open_packed
from data.sources import ARCHIVES, Source, find_source
from functions.support.checkpoint import SavedModel
from functions.support.errors import UserError
from functions.support.files import short

DATA_FOLDER = Path(__file__).resolve().parent
EMBEDDED_SET = DATA_FOLDER / "emoji_faces.zip"
FFHQ_SIZE = 70_000

# Each split of the full FFHQ validates on this many images, the last ones by id.
FFHQ_VALIDATION = {"reference": 7_000, "official": 10_000}


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
    that `find_ffhq` finds, "CIFAR10" the binary version at data/CIFAR10, and "MNIST" the files at
    data/MNIST. Any other name is a path for `find_source`. Raises UserError as `find_source`,
    `Cifar10`, `Mnist` and `open_packed` do.
    """
    source = locate(dataset_name, image_size)
    source.channels = channels
    pack = open_packed(source, image_size, max_bad_images)
    if dataset_name != "emoji_people":
        return replace(pack, name=dataset_name, first_test_id=source.first_test_id)

    # The people share the packed file of the whole embedded set.
    indices = [i for i, image_id in enumerate(pack.ids) if image_id.startswith("people_")]
    ids = [pack.ids[i] for i in indices]
    summary = f"{dataset_name}: {len(ids):,} of the images of {pack.summary}"
    return ImageSet(dataset_name, pack.images[indices], ids, pack.pixels_hash, summary, pack.path)


def locate(dataset_name: str, image_size: int) -> Source:
    """Find the source for a data set's name or path. Raises UserError when there is none."""
    if dataset_name in ("emoji_faces", "emoji_people"):
        return find_source(EMBEDDED_SET, image_size)
    if dataset_name == "FFHQ":
        return find_source(find_ffhq(DATA_FOLDER), image_size, numbered=True)
    if dataset_name == "CIFAR10":
        return Cifar10(DATA_FOLDER / "CIFAR10")
    if dataset_name == "MNIST":
        return Mnist(DATA_FOLDER / "MNIST")
    return find_source(dataset_name, image_size)


def find_ffhq(folder: Path) -> Path:
    """Find the copy of FFHQ in a data folder.

    The copy is an archive in the folder FFHQ, that folder itself, or an archive next to it.
    Raises UserError when there is no copy, or when the folder FFHQ contains several archives.
    """
    ffhq = folder / "FFHQ"
    files = filter(Path.is_file, ffhq.glob("*"))
    archives = [path for path in files if path.suffix.lower() in ARCHIVES]
    if len(archives) > 1:
        names = ", ".join(sorted(path.name for path in archives))
        raise UserError(
            f"{ffhq} contains {names}. Leave one archive there, or name one as the data set."
        )

    archive_names = [f"FFHQ{suffix}" for suffix in ARCHIVES]
    for path in (*archives, ffhq, *map(folder.joinpath, archive_names)):
        # There may be an empty folder next to an archive.
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            return path
    raise UserError(
        "FFHQ was not found. Get the 128x128 thumbnails (2 GB; python download_ffhq.py --thumbs of "
        "github.com/NVlabs/ffhq-dataset, or a copy from Kaggle or Hugging Face)\n"
        f"and put it at {ffhq} (a folder, or {' or '.join(archive_names)}), or name its path as "
        "the data set."
    )


def split_images(image_set: ImageSet, split: str) -> Split:
    """Split a set by sorted id. `split` is "reference" or "official".

    The full FFHQ (ids 0 to 69,999) is split into 63,000 and 7,000 as in the reference run, or
    into the official 60,000 and 10,000. A set with test images validates on these. Any other set,
    including an incomplete FFHQ, validates on its last 10%, but on at least one image. Raises
    UserError when there is no such split, or when no image is left for training.
    """
    if split not in FFHQ_VALIDATION:
        names = " or ".join(map(repr, FFHQ_VALIDATION))
        raise UserError(f"There is no split {split!r}; it can be {names}.")

    name = image_set.name
    ids = image_set.ids
    count = len(ids)
    if ids == list(range(FFHQ_SIZE)):
        val_count = FFHQ_VALIDATION[split]
        reason = f"{split} split of the full FFHQ"
    elif image_set.first_test_id:
        val_count = sum(image_id >= image_set.first_test_id for image_id in ids)
        reason = "its test images"
    else:
        val_count = max(1, count // 10)
        reason = "the last 10% by id"

    train_count = count - val_count
    if train_count < 1:
        raise UserError(
            f"{name} has {count} image(s): too few to train on some and validate on others."
        )

    description = f"{short(name)}: {train_count:,} images train, {val_count:,} validate ({reason})"
    indices = np.arange(count, dtype=np.int64)
    return Split(
        indices[:train_count],
        indices[train_count:],
        description,
        hash_ids(ids[:train_count]),
        hash_ids(ids[train_count:]),
        image_set.pixels_hash,
    )


def load_and_split(saved: SavedModel, name: str | None = None) -> tuple[ImageSet, Split]:
    """Load and split the data set that a model was trained on, as its saved config says.

    A `name`, or path, replaces the one in the config, for other images or another copy. Raises
    UserError when the config does not name the data set, and as `load_images` does.
    """
    diffusion = saved.config["diffusion"]
    if name:
        # The config of another project's model lacks these fields.
        diffusion = {"max_bad_images": 0, "split": "reference", **diffusion, "dataset_name": name}
    for field, kind in {"dataset_name": str, "max_bad_images": int, "split": str}.items():
        if type(diffusion.get(field)) is not kind:
            raise UserError(
                "the model's config does not say which images it was trained on; name a data set "
                "with evaluate.py --data NAME or sample.py --calibrate NAME"
            )
    image_set = load_images(
        diffusion["dataset_name"],
        saved.model.image_size,
        diffusion["max_bad_images"],
        saved.model.channels,
    )
    return image_set, split_images(image_set, diffusion["split"])


def hash_ids(ids: list) -> str:
    """Return a short hash of a list of ids, to show that two runs used the same images."""
    # A file name that is not UTF-8 contains surrogates, which encode() refuses by default.
    lines = "\n".join(map(str, ids)).encode(errors="surrogateescape")
    return hashlib.sha256(lines).hexdigest()[:16]
