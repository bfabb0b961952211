"""Load data sets by name, and split them into training and validation images."""

from collections import Counter
from dataclasses import dataclass, replace
from itertools import zip_longest
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

# Of a set without a rule of its own, this fraction is held out.
HELD_OUT = 0.1
# Beside a folder train/, the first of these folders has the images that are held out.
HELD_OUT_FOLDERS = ("val", "valid", "validation", "test")


@dataclass(frozen=True)
class Split:
    """A split of an ImageSet into training and validation images.

    The indices are int64. The rule says in words which images are held out. Each hash of ids is
    `hash_ids` of the ids of one part. The hash of pixels is that of the whole ImageSet.
    """

    train_indices: np.ndarray
    val_indices: np.ndarray
    rule: str
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
        pack = replace(pack, images=pack.images[indices], ids=ids, names=ids, summary=summary)
    return replace(pack, name=dataset_name)


def locate(dataset_name: str) -> Source:
    """Find the source for a data set's name or path, and its rule of the split.

    Raises UserError when there is none.
    """
    if dataset_name in EMBEDDED_NAMES:
        return replace(find_source(EMBEDDED_SET), rule="id")
    if dataset_name == "FFHQ":
        source = find_source(find_ffhq())
        if isinstance(source.ids[0], str):
            raise UserError(
                f"{source.path}: each image of FFHQ must have a number of its own as its name. "
                "Remove other images and second copies."
            )
        return replace(source, rule="FFHQ")
    if dataset_name in FILES:
        return read_torchvision_set(dataset_name, DATA_FOLDER)
    source = find_source(dataset_name)
    # A copy of FFHQ somewhere else.
    if len(source.ids) >= 60_000 and set(source.ids) <= set(range(70_000)):
        return replace(source, rule="FFHQ")
    return split_by_folders(source)


def split_by_folders(source: Source) -> Source:
    """Let the folders at a source's top, such as train/ and val/, say which images are held out.

    The top is the first level at which the images' folders differ. There must be train/ and one of
    HELD_OUT_FOLDERS; images elsewhere, such as in test/ beside val/, are counted as ignored. A
    source without such folders is returned unchanged.
    """
    folders = [member.name.split("/")[:-1] for member in source.members]
    levels = enumerate(zip_longest(*folders, fillvalue=""))
    depth, tops = next((level for level in levels if len({*level[1]}) > 1), (0, ()))
    found = {top.lower(): top for top in tops}
    held_out = next((found[name] for name in HELD_OUT_FOLDERS if name in found), None)
    if held_out is None or "train" not in found:
        return source

    sides = (found["train"], held_out)
    used = [i for i, top in enumerate(tops) if top in sides]
    unused = Counter(f"in {top or '.'}/" for top in tops if top not in sides)
    return replace(
        source,
        members=[source.members[i] for i in used],
        ids=[source.ids[i] for i in used],
        ignored=source.ignored + unused,
        rule="/".join([*folders[tops.index(held_out)][:depth], held_out, ""]),
    )


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
        f"FFHQ was not found at {DATA_FOLDER / 'FFHQ'} (a folder, or {' or '.join(archives)}); "
        "docs/ffhq.md says where to get its 128x128 thumbnails, and how to name another place"
    )


def split_images(image_set: ImageSet, split: str) -> Split:
    """Split a set by its rule. `split`, for FFHQ, is "reference" or "official".

    - "FFHQ": an image's id alone says its side. Ids from 63,000 on are held out, as in the
      reference run, or from 60,000 on with "official". A part of FFHQ with images on only one side
      is split as by "id".
    - "id": the last tenth by id, but at least one image.
    - "name": an image is held out if the hash of its file's name, without folders, is below
      HELD_OUT. So it stays on its side, whatever is added to the set, or cannot be read. If no
      image is, the one with the lowest hash is held out. A row's name is its number.
    - Otherwise, images whose names begin with the rule are held out.

    Raises UserError when no image is left for training or for validation.
    """
    ids = image_set.ids
    names = image_set.names
    rule = image_set.rule
    count = len(ids)
    first = 60_000 if split == "official" else 63_000
    if rule == "FFHQ" and ids[0] < first <= ids[-1]:
        held_out = np.array(ids) >= first
        reason = f"FFHQ's ids from {first:,} on"
    elif rule in ("FFHQ", "id"):
        held_out = np.arange(count) >= count - max(1, count // 10)
        reason = "the last 10% by id"
    elif rule == "name":
        hashes = np.array([hash_of_name(name) for name in names])
        held_out = hashes <= max(HELD_OUT, hashes.min())
        reason = "a tenth, by a hash of each name"
    else:
        held_out = np.array([name.startswith(rule) for name in names])
        reason = f"its {rule.rstrip('/')} images"

    train_indices = np.flatnonzero(~held_out)
    val_indices = np.flatnonzero(held_out)
    name = short(image_set.name)
    counts = f"{name}: {len(train_indices):,} images train, {len(val_indices):,} validate"
    if held_out.all() or not held_out.any():
        raise UserError(
            f"{counts} ({reason}): too few; folders train/ and val/ can say which image is which"
        )
    some = ", ".join(short(names[i]) for i in val_indices[:3])
    return Split(
        train_indices,
        val_indices,
        reason,
        f"{counts} ({reason}), such as {some}",
        hash_ids([ids[i] for i in train_indices]),
        hash_ids([ids[i] for i in val_indices]),
        image_set.pixels_hash,
    )


def hash_of_name(path: str) -> float:
    """Return a number from 0 to 1 that depends only on a file's name, without its folders."""
    name = path.rpartition("/")[2]
    return int(sha256(name)[:8], 16) / 16**8


def hash_ids(ids: list) -> str:
    """Return a short hash of a list of ids, to show that two runs used the same images."""
    return sha256("\n".join(map(str, ids)))[:16]
