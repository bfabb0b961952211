"""Find the images of a data set: in a folder, in a zip of one, or in Hugging Face's parquet files.

Whoever finds images decides on which side of the split each is, and which label it has. A zip is
read in place, so the name of a member never becomes a path on this machine.
"""

import os
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.decode import parsing
from functions.support.errors import UserError, door

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")

# Hidden files, macOS's metadata of others, and the packs of a folder, which lie in it.
PASSED_OVER = re.compile(r"(.*/)?(\.[^/]|__MACOSX)|.*\.packed\.npy(\.json)?$")

# A name with a number: folders, a prefix and the number, as in x/img00000012.png.
NUMBERED_NAME = re.compile(r"(?:.*/)?([A-Za-z_-]*)(\d{1,18})(?:\.\w+)?")

# Beside train/, the first of these folders that a set has is held out.
HELD_OUT_FOLDERS = ("val", "valid", "validation", "test")


class Member(NamedTuple):
    """One image of a source."""

    # The name is the path inside the source. For a row of a table it ends with its number.
    name: str
    # A CRC-32 of the content, or a file's size and time. A file that is changed and keeps both is
    # taken for the old one.
    stamp: int | tuple[int, int]
    # The function returns a file's bytes, or uint8 (H, W, C).
    read: Callable[[], bytes | np.ndarray]
    # The side of a split: "train", or the folder that is held out, such as "val". Other rules than
    # that of folders do not look at it.
    side: str | None = None
    label: str | None = None


@dataclass
class Source:
    """The images at a path, by their ids in rising order, which are all int or all str."""

    path: Path
    members: dict[Any, Member]
    # What decides which images are held out (`split_images`): "name", "id", "FFHQ", or the folder
    # that has them, such as "val".
    rule: str
    # How many files are no images of the set.
    others: int = 0


def find_source(path: str | os.PathLike, rule: str = "name") -> Source:
    """Find the images at a path, sort them by their ids, and decide their sides and labels.

    `rule` is that of `Source`. With "name", folders train/ and one of HELD_OUT_FOLDERS directly in
    the folder decide the split if there are both; images elsewhere are then no images of the set.
    The nearest other folder is the label of an image, but for FFHQ; a row of a table has its own.
    Raises UserError for what is none of the three kinds, or damaged, and OSError when the disk
    cannot be read.
    """
    path = Path(path).expanduser()
    images, others = list_images(path)
    folders = [image.name.split("/")[:-1] for image in images]
    # The zip of a folder often has that folder itself, and all others in it.
    level = int(len({"".join(each[:1]) for each in folders}) == 1)
    sides = ["".join(each[level : level + 1]).lower() for each in folders]
    if rule == "name" and "train" in sides:
        rule = next((side for side in HELD_OUT_FOLDERS if side in sides), rule)
    by_folder = rule in HELD_OUT_FOLDERS
    source = Source(path, {}, rule, others)
    ids = choose_ids([image.name for image in images])
    # No two ids are equal, so only ids are compared.
    for image_id, image, above, side in sorted(zip(ids, images, folders, sides, strict=True)):
        if by_folder and side not in ("train", rule):
            source.others += 1
            continue
        # Neither the folder of a side nor one of FFHQ's is a label.
        is_label = rule != "FFHQ" and not (by_folder and len(above) == level + 1)
        label = image.label if is_label else None
        source.members[image_id] = image._replace(side=side, label=label)
    return source


def list_images(path: Path) -> tuple[list[Member], int]:
    """List the images at a path, each with its label, and count the other files.

    A label is the nearest folder, or that of a row. Raises what `find_source` does.
    """
    is_zip = path.suffix.lower() == ".zip"
    files = list_zip(path) if is_zip else list_folder(path)
    images = [file for file in files if file.name.lower().endswith(IMAGE_EXTENSIONS)]
    tables = [path / file.name for file in files if not is_zip]
    tables = [table for table in tables if table.suffix.lower() == ".parquet"]
    others = len(files) - len(images) - len(tables)
    if bool(images) == bool(tables):
        raise UserError(
            f"{path} has {len(images):,} images, {len(tables):,} parquet files and {others:,} "
            f"other files; a data set is a folder of images ({', '.join(IMAGE_EXTENSIONS)}), a zip "
            "of one, or a folder of parquet files or one of them; a tar must be unpacked (tar xf)"
        )
    if tables:
        with door(str(path)):
            from extras.parquet import list_parquet
        return list_parquet(path, sorted(tables)), others
    labels = [[None, *image.name.split("/")][-2] for image in images]
    return [i._replace(label=label) for i, label in zip(images, labels, strict=True)], others


def list_folder(path: Path) -> list[Member]:
    """List the files in a folder and its subfolders, or the one file `path`, whose name is "."."""
    files = {file.relative_to(path).as_posix(): file for file in files_below(path)}
    return [
        Member(name, stamp_of(file), file.read_bytes)
        for name, file in files.items()
        if not PASSED_OVER.match(name)
    ]


def files_below(path: Path, above: tuple = ()) -> Iterator[Path]:
    """Yield the files in a folder and its subfolders; `above` are the folders around it."""
    # Links are followed, because a data folder is often a link to another disk. One that leads back
    # to a folder around it would lead to the same files again, without an end.
    if not path.is_dir():
        yield path
    elif (place := path.resolve()) not in above:
        for each in path.iterdir():
            yield from files_below(each, (*above, place))


def stamp_of(file: Path) -> tuple[int, int]:
    """Return the size of a file in bytes, and its modification time in ns."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def list_zip(path: Path) -> list[Member]:
    """List the files in a zip. Of several with one name, the last one counts, as in a folder."""
    with parsing(f"{path} cannot be read"):
        archive = zipfile.ZipFile(path)

    def read(info):
        with parsing("cannot be read"):
            return archive.read(info)

    files = {info.filename: info for info in archive.infolist() if not info.is_dir()}
    return [
        Member(name, info.CRC, partial(read, info))
        for name, info in files.items()
        if not PASSED_OVER.match(name)
    ]


def choose_ids(names: list[str]) -> list[int] | list[str]:
    """Return the ids of images: the numbers in their names, or the names if not all have one."""
    matches = [NUMBERED_NAME.fullmatch(name) for name in names]
    if all(matches):
        prefixes = {match[1] for match in matches}
        numbers = [int(match[2]) for match in matches]
        if len(prefixes) == 1 and len(set(numbers)) == len(numbers):
            return numbers
    return names
