"""Find images in a folder, in a zip, a tar, an npz or a parquet file, or in shards of these.

Archives are read in place and never extracted, so the name of a member never becomes a path on
this machine.
"""

import os
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from data.decode import BadImage
from functions.support.errors import UserError
from functions.support.files import READ_ERRORS, short

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")

# Each of these folders contains a copy of FFHQ, in FFHQ's own download or on Kaggle.
FFHQ_COPIES = {"thumbnails128x128", "resized", "images1024x1024", "in-the-wild-images"}

# A name with a number: folders, a prefix and the number, as in x/img00000012.png.
NUMBERED_NAME = re.compile(r"(?:.*/)?([A-Za-z_-]*)(\d{1,18})(?:\.\w+)?")


class Member(NamedTuple):
    """One image of a source."""

    # The name is the path inside the source. For a row of an array or a table it is a number.
    name: str
    # The stamp changes when the content does. It is a CRC-32, or a file's size and time.
    stamp: int | tuple[int, int]
    # The function returns a file's bytes, or uint8 (H, W, C).
    read: Callable[[], bytes | np.ndarray]


@dataclass
class Source:
    """The images at a path, sorted by their ids, which are all int or all str."""

    path: Path
    members: list[Member]
    ids: list
    # Files that are no images of the set, counted by their endings or their folders.
    ignored: Counter = field(default_factory=Counter)
    # Images are converted to this number of channels, RGB or grey, after they are read.
    channels: int = 3
    # What decides which images are held out (`split_images`): "name", "id", "FFHQ", or the start of
    # their names, a folder such as "val/".
    rule: str = "name"

    def describe_ignored(self) -> str:
        """Return the end of a sentence that counts the ignored files, or "" if there are none."""
        text = ", ".join(f"{count:,} {kind}" for kind, count in self.ignored.most_common())
        return f"; ignored: {short(text)}" if text else ""


def find_source(path: str | os.PathLike) -> Source:
    """Find the images at a path, and sort them by their ids.

    The ids do not depend on the order in which a folder lists its files. If the ids are numbers,
    they do not depend on the files' folders either.

    Raises UserError when the path is neither a folder nor one of `ARCHIVES`, cannot be read, or
    contains no image or several copies of FFHQ, and OSError, which names it, when a file or folder
    in it cannot be listed.
    """
    path = Path(os.path.expanduser(path))
    if not path.exists():
        raise UserError(f"{path} does not exist. Give a folder, or one of {', '.join(ARCHIVES)}.")
    if path.is_dir():
        members, strays = list_folder(path)
    elif path.suffix.lower() in ARCHIVES:
        members, strays = list_archives([path], path)
    else:
        raise UserError(
            f"{path}: only files with names that end with {', '.join(ARCHIVES)} can be read; "
            "unpack it, or give another path."
        )
    source = Source(path, members, choose_ids([member.name for member in members]))
    source.ignored.update(sorted(map(kind_of, strays)))
    if not members:
        endings = ", ".join(IMAGE_EXTENSIONS)
        raise UserError(f"{path} contains no image ({endings}){source.describe_ignored()}.")

    folders = {folder for member in members for folder in member.name.split("/")}
    copies = sorted(FFHQ_COPIES & folders)
    if len(copies) > 1:
        raise UserError(f"{path} contains {' and '.join(copies)}, copies of one set. Give one.")
    members_by_id = dict(zip(source.ids, members, strict=True))
    source.ids = sorted(members_by_id)
    source.members = [members_by_id[image_id] for image_id in source.ids]
    return source


def list_folder(path: Path) -> tuple[list[Member], list[str]]:
    """List the image files in a folder and its subfolders, or the images in its archives.

    The archives are the shards of one set. They are read if there are not more image files, such as
    a single preview. The second list has the names of all other files.
    """
    images = {}
    archives = {}
    strays = []
    for file in files_below(path):
        name = file.relative_to(path).as_posix()
        if is_image_name(name):
            images[name] = file
        elif file.suffix.lower() in ARCHIVES and not is_hidden(name):
            archives[name] = file
        # Packs of the folder lie in it.
        elif ".packed" not in file.name:
            strays.append(name)

    if len(archives) >= len(images):
        members, strays_inside = list_archives(sorted(archives.values()), path)
        return members, [*images, *strays, *strays_inside]
    members = [Member(name, stamp_of(file), file.read_bytes) for name, file in images.items()]
    return members, [*archives, *strays]


def files_below(folder: Path, above: tuple = ()) -> Iterator[Path]:
    """Yield the files in a folder and its subfolders. `above` are the places of those around it."""
    # Links are followed, because a data folder is often a link to another disk. One that leads back
    # to a folder around it would lead to the same files again, without an end.
    status = folder.stat()
    place = (status.st_dev, status.st_ino)
    if place in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from files_below(folder / entry.name, (*above, place))
            else:
                yield folder / entry.name


def stamp_of(file: Path) -> tuple[int, int]:
    """Return the size of a file in bytes, and its modification time in ns."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def list_archives(archives: list[Path], root: Path) -> tuple[list[Member], list[str]]:
    """List the images in archives, the shards of one set, at or below the path `root`.

    The second list has the names of all other files in them. Raises UserError, which names the
    archive, when one of them cannot be read.
    """
    members = []
    strays = []
    for archive in archives:
        try:
            found = ARCHIVES[archive.suffix.lower()](archive)
        except READ_ERRORS as error:
            raise UserError(
                f"{archive} cannot be read ({short(error)}). Was its download cut short?"
            ) from None
        shard = f"{archive.relative_to(root).as_posix()}/" if archive != root else ""
        for name, *others in found:
            # Rows are numbered through all shards.
            if name is None or is_image_name(name):
                members.append(Member(shard + (name or str(len(members))), *others))
            else:
                strays.append(name)
    return members, strays


def list_zip(path: Path) -> list[Member]:
    """List the files in a zip."""
    archive = zipfile.ZipFile(path)
    return [
        Member(info.filename, info.CRC, partial(archive.read, info))
        for info in archive.infolist()
        if not info.is_dir()
    ]


def list_tar(path: Path) -> list[Member]:
    """List the files in a plain tar, such as a shard of a WebDataset.

    Raises ReadError when the tar has no end, or a damaged header.
    """
    archive = tarfile.TarFile(path)

    def read(info):
        # A link has the content of the file that it leads to.
        file = archive.extractfile(info)
        if file is None:
            raise BadImage("not a file")
        return file.read()

    # A tar has no checksums of its members' contents.
    stamp = stamp_of(path)
    members = [
        Member(info.name, stamp, partial(read, info)) for info in archive if not info.isdir()
    ]
    # Python takes a damaged header for the end, which is two blocks of zeros.
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(2 * tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"it is cut short or damaged at byte {archive.offset:,}")
    return members


def list_npz(path: Path) -> list[Member]:
    """List the rows of the one uint8 array (N, H, W, 3) or (N, H, W, 1). All is kept in memory.

    Raises UserError when there is not one.
    """
    arrays = [
        array
        for array in np.load(path).values()
        # Arrays (N, 3, H, W) are none. Pillow knows pixels of up to four channels.
        if array.dtype == np.uint8 and array.ndim == 4 and array.shape[3] <= 4
    ]
    if len(arrays) != 1:
        raise UserError(f"{path} has {len(arrays)} uint8 arrays (N, H, W, 3), and must have one.")
    stamp = stamp_of(path)
    return [Member(None, stamp, row.copy) for row in arrays[0]]


def list_parquet(path: Path) -> list[Member]:
    """List the rows of the one column of encoded images, as Hugging Face's `Image` stores them.

    Raises UserError if pyarrow is not installed, or there is not one such column.
    """
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{path} needs pyarrow: python -m pip install pyarrow") from None
    file = ParquetFile(path)
    # Such a column is a struct of `bytes` and `path`. That of a list of images has a longer path.
    columns = [c.path for c in file.schema if re.fullmatch(r"[^.]+\.bytes", c.path)]
    if len(columns) != 1:
        raise UserError(f"{path} has {len(columns)} columns of encoded images, and must have one.")

    def read(i):
        row = read_column(file, columns[0])[i].as_py()
        return row["bytes"] if row else b""

    stamp = stamp_of(path)
    return [Member(None, stamp, partial(read, i)) for i in range(file.metadata.num_rows)]


# Only the newest columns are kept in memory, because a set may have many shards. There are two of
# them, because several threads may read the end of a shard and the start of the next one.
@lru_cache(maxsize=2)
def read_column(file: Any, column: str) -> Sequence:
    """Return a column of a `ParquetFile`."""
    return file.read([column]).column(0)


# These functions list the images in files with these suffixes, in upper or lower case.
ARCHIVES = {".zip": list_zip, ".tar": list_tar, ".npz": list_npz, ".parquet": list_parquet}


def choose_ids(names: list[str]) -> list[int] | list[str]:
    """Return the ids of images: the numbers in their names, or the names if not all have one."""
    matches = [NUMBERED_NAME.fullmatch(name) for name in names]
    if all(matches):
        prefixes = {match[1] for match in matches}
        numbers = [int(match[2]) for match in matches]
        if len(prefixes) == 1 and len(set(numbers)) == len(numbers):
            return numbers
    return names


def is_image_name(name: str) -> bool:
    """Return whether a path inside a source has an image's extension and is not hidden."""
    return name.lower().endswith(IMAGE_EXTENSIONS) and not is_hidden(name)


def is_hidden(name: str) -> bool:
    """Return whether a path inside a source is hidden, or macOS's metadata of another file."""
    # The names in the tar of a folder "." begin with it.
    parts = [part for part in name.split("/") if part != "."]
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


def kind_of(name: str) -> str:
    """Return what an ignored file is counted as: its ending, or "hidden"."""
    if is_hidden(name):
        return "hidden"
    return PurePosixPath(name).suffix.lower() or "without an ending"
