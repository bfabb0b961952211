"""Find images in a folder, in a zip, an npz or a parquet file, or in shards of these.

Whoever lists images decides on which side of the split each is, and which label it has. Archives
are read in place, so the name of a member never becomes a path on this machine. CIFAR-10 and MNIST
are read by torchvision, which can also download them.
"""

import json
import os
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from itertools import zip_longest
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.npyio import NpzFile

from data.decode import BadImage, parsing
from functions.support.errors import UserError, printable

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")

# A name with a number: folders, a prefix and the number, as in x/img00000012.png.
NUMBERED_NAME = re.compile(r"(?:.*/)?([A-Za-z_-]*)(\d{1,18})(?:\.\w+)?")

# What must be in the data folder for each set.
TORCHVISION = {
    "CIFAR10": "cifar-10-batches-py, unpacked from cifar-10-python.tar.gz (the binary version is "
    "not read)",
    "MNIST": "MNIST/raw, a folder with its four files, such as train-images-idx3-ubyte",
}


class Member(NamedTuple):
    """One image of a source."""

    # The name is the path inside the source. For a row of an array or a table it is a number.
    name: str
    # A CRC-32 of the content, or a file's size and time. A file that is changed and keeps both is
    # taken for the old one.
    stamp: int | tuple[int, int]
    # The function returns a file's bytes, or uint8 (H, W, C).
    read: Callable[[], bytes | np.ndarray]
    # The side of a split that its folders name: "train", or one such as "val"; None if none does.
    side: str | None = None
    # The label, or a function that reads that of a row; None without one.
    label: str | Callable[[], str | None] | None = None


@dataclass
class Source:
    """The images at a path, by their ids in rising order, which are all int or all str."""

    path: Path
    members: dict[Any, Member]
    # Files that are no images of the set, counted by their endings or their folders.
    ignored: Counter
    # What decides which images are held out (`split_images`): "name", "id", "FFHQ", or the folder
    # that has them, such as "val".
    rule: str

    def describe_ignored(self) -> str:
        """Return the end of a sentence that counts the ignored files, or "" if there are none."""
        text = ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.ignored.items()))
        return f"; ignored: {printable(text)}" if text else ""


def find_source(path: str | os.PathLike, rule: str = "name") -> Source:
    """Find the images at a path, sort them by their ids, and decide their sides and labels.

    `rule` is that of `Source`. With "name", folders train/ and one of HELD_OUT_FOLDERS decide the
    split if there are both; images elsewhere are then counted as ignored. The nearest other folder
    that is no archive is the label of an image, unless its row has one. FFHQ has no labels. Raises
    UserError when there is no image, or an archive is damaged, and OSError when the disk cannot be
    read.
    """
    source = Source(Path(os.path.expanduser(path)), {}, Counter(), rule)
    path, ignored = source.path, source.ignored
    members = []
    if path.is_dir():
        members = list_folder(path, ignored)
    elif path.is_file() and path.suffix.lower() in ARCHIVES:
        members = list_archives([path], path, ignored)
    if not members:
        problem = "contains no image that can be read" if path.exists() else "does not exist"
        raise UserError(
            f"{path} {problem}{source.describe_ignored()}. Give a folder of images "
            f"({', '.join(IMAGE_EXTENSIONS)}), or one of {', '.join(ARCHIVES)}; a tar must be "
            "unpacked (tar xf)."
        )
    # A zip may have two files of one name. As when it is unpacked, the last one counts.
    by_name = {member.name: member for member in members}
    ignored += Counter({"of a repeated name": len(members) - len(by_name)})

    places = sides_of([*by_name])
    sides = {side for _, side in places}
    if rule == "name" and "train" in sides:
        source.rule = next((side for side in HELD_OUT_FOLDERS if side in sides), rule)
    images = zip(choose_ids([*by_name]), by_name.values(), places, strict=True)
    # No two ids are equal, so only ids are compared.
    for image_id, member, (level, side) in sorted(images):
        folders = member.name.split("/")[:-1]
        if source.rule in HELD_OUT_FOLDERS:
            if side not in ("train", source.rule):
                ignored[f"in {side or '/'.join(folders) or '.'}/"] += 1
                continue
            del folders[level]
        labels = [member.label, *(name for name in folders if kind_of(name) not in ARCHIVES)]
        label = None if rule == "FFHQ" else member.label or labels[-1]
        source.members[image_id] = member._replace(side=side, label=label)
    return source


def list_folder(path: Path, ignored: Counter) -> list[Member]:
    """List the image files in a folder and its subfolders, or the images in its archives.

    Archives are the shards of one set. One image beside archives is a preview, and one archive
    beside images is none of them. Other files are counted in `ignored`. Raises UserError where both
    are several.
    """
    images = {}
    archives = {}
    for file in files_below(path, ignored):
        name = file.relative_to(path).as_posix()
        kind = kind_of(name)
        if kind in IMAGE_EXTENSIONS:
            images[name] = file
        elif kind in ARCHIVES:
            archives[name] = file
        # Packs of the folder lie in it.
        elif ".packed" not in file.name:
            ignored[kind] += 1

    if len(archives) > 1 and len(images) > 1:
        raise UserError(
            f"{path} has {len(images):,} images, such as {printable(min(images))}, and "
            f"{len(archives):,} archives, such as {printable(min(archives))}. Which are the data? "
            "Name their folder, or move the others away."
        )
    if len(archives) >= len(images):
        ignored.update(map(kind_of, images))
        return list_archives(sorted(archives.values()), path, ignored)
    ignored.update(map(kind_of, archives))
    return [Member(name, stamp_of(file), partial(read_file, file)) for name, file in images.items()]


def files_below(folder: Path, ignored: Counter, above: tuple = ()) -> Iterator[Path]:
    """Yield the files in a folder and its subfolders; count in `ignored` folders of samples.

    `above` are the places of the folders around it.
    """
    # Links are followed, because a data folder is often a link to another disk. One that leads back
    # to a folder around it would lead to the same files again, without an end.
    place = folder.resolve()
    if place in above:
        return
    # The manifest with which sample.py marks its pictures. They may be named themselves, to be
    # measured.
    manifest = folder / "samples.json"
    if above and manifest.is_file() and '"sampler": "' in manifest.read_text(errors="replace"):
        ignored["folder of samples"] += 1
        return
    for path in folder.iterdir():
        if path.is_dir():
            yield from files_below(path, ignored, (*above, place))
        else:
            yield path


def stamp_of(file: Path) -> tuple[int, int]:
    """Return the size of a file in bytes, and its modification time in ns."""
    status = file.stat(follow_symlinks=file.exists())
    return status.st_size, status.st_mtime_ns


def read_file(file: Path) -> bytes:
    """Return the bytes of a file. Raises BadImage for a dead link, a pipe, and the like."""
    if not file.is_file():
        raise BadImage("not a file")
    return file.read_bytes()


def list_archives(archives: list[Path], root: Path, ignored: Counter) -> list[Member]:
    """List the images in archives, the shards of one set, at or below the path `root`.

    Other files in them are counted in `ignored`. Raises UserError if one is damaged.
    """
    members = []
    for archive in archives:
        try:
            found = ARCHIVES[archive.suffix.lower()](archive)
        except BadImage as error:
            raise UserError(
                f"{archive} {error}. Either its download was cut short, or it is no "
                f"{archive.suffix} file."
            ) from error
        shard = f"{archive.relative_to(root).as_posix()}/" if archive != root else ""
        for name, *others in found:
            # Rows are numbered through all shards.
            if name is None or kind_of(name) in IMAGE_EXTENSIONS:
                members.append(Member(shard + (name or str(len(members))), *others))
            else:
                ignored[kind_of(name)] += 1
    return members


def list_zip(path: Path) -> list[Member]:
    """List the files in a zip."""
    with parsing("cannot be read", own=ValueError):
        archive = zipfile.ZipFile(path)

    def read(info):
        with parsing("cannot be read"):
            return archive.read(info)

    return [
        # Some programs for Windows write backslashes.
        Member(info.filename.replace("\\", "/"), info.CRC, partial(read, info))
        for info in archive.infolist()
        if not info.filename.endswith(("/", "\\"))
    ]


def list_npz(path: Path) -> list[Member]:
    """List the rows of the one uint8 array (N, H, W, 3) or (N, H, W, 1). All is kept in memory."""
    with parsing("cannot be read"):
        values = [*NpzFile(path).values()]
    arrays = [
        array
        for array in values
        # A file of another kind is bytes. Arrays (N, 3, H, W) are no images. Pillow knows pixels of
        # up to four channels.
        if getattr(array, "dtype", None) == np.uint8 and array.ndim == 4 and array.shape[3] <= 4
        if array.size
    ]
    if len(arrays) != 1:
        raise UserError(f"{path} has {len(arrays)} uint8 arrays (N, H, W, 3), and must have one.")
    stamp = stamp_of(path)
    return [Member(None, stamp, row.copy) for row in arrays[0]]


def list_parquet(path: Path) -> list[Member]:
    """List the rows of the one column of encoded images, as Hugging Face's `Image` stores them."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError(f"{path} needs pyarrow: python -m pip install pyarrow") from error
    with parsing("cannot be read"):
        file = ParquetFile(path)
        paths = [column.path for column in file.schema]
    # Such a column is a struct of `bytes` and `path`. That of a list of images has a longer path.
    columns = [path for path in paths if re.fullmatch(r"[^.]+\.bytes", path)]
    if len(columns) != 1:
        raise UserError(f"{path} has {len(columns)} columns of encoded images, and must have one.")

    def read(i):
        with parsing("cannot be read"):
            row = read_column(file, columns[0])[i].as_py()
        # A row may be empty, and a column of this name may hold something else.
        data = row and row["bytes"]
        return data if isinstance(data, bytes) else b""

    # Only a set with labels reads them, by the names of Hugging Face's metadata, if any.
    @cache
    def labels():
        schema = file.schema_arrow
        if "label" not in schema.names:
            return [None] * file.metadata.num_rows
        with parsing(f"{path}: the labels cannot be read"):
            values = file.read(["label"]).column(0).to_pylist()
            feature = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        # Anything else on the way to the names means that there are none.
        for key in ("info", "features", "label", "names"):
            feature = feature.get(key) if isinstance(feature, dict) else None
        names = dict(enumerate(feature or []))
        # Hugging Face has -1 where there is no label. A list of several is none.
        return [
            str(names.get(value, value)) if isinstance(value, (int, str)) and value != -1 else None
            for value in values
        ]

    stamp = stamp_of(path)
    return [
        Member(None, stamp, partial(read, i), label=lambda i=i: labels()[i])
        for i in range(file.metadata.num_rows)
    ]


# Only the newest columns are kept in memory, because a set may have many shards. There are two of
# them, because several threads may read the end of a shard and the start of the next one.
@lru_cache(maxsize=2)
def read_column(file: Any, column: str) -> Sequence:
    """Return a column of a `ParquetFile`."""
    return file.read([column]).column(0)


# These functions list the images in files with these suffixes, in upper or lower case.
ARCHIVES = {".zip": list_zip, ".npz": list_npz, ".parquet": list_parquet}


def choose_ids(names: list[str]) -> list[int] | list[str]:
    """Return the ids of images: the numbers in their names, or the names if not all have one."""
    matches = [NUMBERED_NAME.fullmatch(name) for name in names]
    if all(matches):
        prefixes = {match[1] for match in matches}
        numbers = [int(match[2]) for match in matches]
        if len(prefixes) == 1 and len(set(numbers)) == len(numbers):
            return numbers
    return names


# Beside train/, the first of these folders that a set has is held out.
HELD_OUT_FOLDERS = ("val", "valid", "validation", "test")
# The folder or shard of a side, as train/, training/, val2017/ or train-00000-of-00002.parquet; or
# any other, whose first group is None.
SIDE = re.compile(
    rf"(train|{'|'.join(HELD_OUT_FOLDERS)})(ing)?([-_]?\d\w*(-of-\d+(-\w+)?)?)?"
    rf"({'|'.join(map(re.escape, ARCHIVES))})?|[^/]*"
)


def sides_of(names: Sequence[str]) -> list[tuple[int, str | None]]:
    """Return at which level of folders each image's side of a split is named, and which it is.

    The first level of folders that has both sides counts, as the second one where test/ has train/
    and val/. Without such a level, the first folder that names a side counts.
    """
    folders = [
        [SIDE.fullmatch(folder.lower())[1] for folder in name.split("/")[:-1]] for name in names
    ]
    for level, sides in enumerate(zip_longest(*folders)):
        if "train" in sides and not {*HELD_OUT_FOLDERS}.isdisjoint(sides):
            return [(level, side) for side in sides]
    return [next(filter(lambda place: place[1], enumerate(sides)), (0, None)) for sides in folders]


def kind_of(name: str) -> str:
    """Return the ending of a path inside a source, in lower case.

    It is "hidden" for a hidden file and for macOS's metadata of another one.
    """
    path = PurePosixPath(name)
    if any(part.startswith((".", "__MACOSX")) for part in path.parts):
        return "hidden"
    return path.suffix.lower() or "without an ending"


def read_torchvision_set(name: str, folder: Path, download: bool = False) -> Source:
    """Read all images of a set of TORCHVISION in a data folder; the test images are the last ones.

    CIFAR-10's are uint8 (32, 32, 3), and MNIST's (28, 28, 1). A missing set is downloaded if
    `download` is true. Raises UserError when a set is damaged, missing, or not in TORCHVISION.
    """
    if name not in TORCHVISION:
        raise UserError(f"{name} cannot be downloaded, only {' and '.join(TORCHVISION)} can.")

    # This import takes a second.
    from torchvision import datasets

    dataset = getattr(datasets, name)
    try:
        with parsing("cannot be read"):
            train, test = (dataset(folder, train, download=download) for train in (True, False))
    except BadImage as error:
        raise UserError(
            f"{name} {error}. Delete a damaged copy, and put into {folder} {TORCHVISION[name]}; "
            f"python data/prepare.py {name} --download does so, where there is a network."
        ) from error

    source = Source(folder / name, {}, Counter(), "test")
    for side, part in (("train", train), ("test", test)):
        for image, target in zip(np.asarray(part.data), part.targets, strict=True):
            i = len(source.members)
            # MNIST has no dimension for its one channel, and calls its classes "5 - five".
            pixels = image.reshape(*image.shape[:2], -1)
            label = part.classes[target].partition(" - ")[0]
            stamp = zlib.crc32(pixels.tobytes())
            source.members[i] = Member(f"{side}/{i}", stamp, pixels.copy, side, label)
    return source
