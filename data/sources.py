"""Find images in a folder, in a zip, a tar, an npz or a parquet file, or in shards of these.

Archives are read in place and never extracted, so the name of a member never becomes a path on
this machine.
"""

import os
import re
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.decode import BadImage
from functions.support.errors import UserError
from functions.support.files import READ_ERRORS, short

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")

# Each of these folders contains a copy of FFHQ, with images of this side in pixels. All copies use
# the same image numbers, so only one of them is read. The uncropped photos have no common size.
# Their 0 makes them the last choice.
FFHQ_LAYOUTS = {
    "in-the-wild-images": 0,
    "thumbnails128x128": 128,
    "resized": 256,
    "images1024x1024": 1024,
}

# A name with a number: folders, a prefix and the number, as in x/img00000012.png.
NUMBERED_NAME = re.compile(r"(?:.*/)?([A-Za-z_-]*)(\d{1,18})(?:\.\w+)?")

# If at most this fraction of a set's images is not numbered, these are strays and are skipped.
FEW = 0.01


class Unreadable(BadImage):
    """The bytes of an image cannot be read now, but perhaps later, with another permission."""


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
    # Images are converted to this number of channels, RGB or grey, after they are read.
    channels: int = 3
    # The last images are this number of test images.
    test_count: int = 0


def read_member(member: Member) -> bytes | np.ndarray | BadImage:
    """Read an image: a file's bytes, or uint8 (H, W, C), or why it cannot be read.

    The members of a source must be read by one thread at a time.
    """
    try:
        return member.read()
    except READ_ERRORS as error:
        kind = Unreadable if isinstance(error, OSError) else BadImage
        return kind(f"cannot be read ({short(error)})")


def find_source(path: str | os.PathLike, image_size: int, numbered: bool = False) -> Source:
    """Find the images at a path, and sort them by their ids.

    The ids do not depend on the order in which a folder lists its files. If the ids are numbers,
    they do not depend on the files' folders either. If there are several copies of FFHQ, the
    smallest that need not be enlarged to `image_size` (pixels) is read. In a set that must be
    `numbered`, unnumbered images are skipped, and two images with the same number are an error.
    In any other set, unnumbered images are skipped if they are few, such as a stray preview.png
    among 70,000 images. What is skipped is printed.

    Raises UserError when the path is neither a folder nor one of `ARCHIVES`, cannot be read or
    contains no image, and OSError, which names it, when a file or folder in it cannot be listed.
    """
    # An unknown home folder, as in ~nobody/faces, stays as it is, and does not exist.
    path = Path(os.path.expanduser(path))
    if not path.exists():
        raise UserError(f"{path} does not exist. Give a folder, or one of {', '.join(ARCHIVES)}.")
    if path.is_dir():
        members = list_folder(path)
    elif path.suffix.lower() in ARCHIVES:
        members = list_archives([path], path)
    else:
        raise UserError(
            f"{path}: only files with names that end with {', '.join(ARCHIVES)} can be read; "
            "unpack it, or give another path."
        )
    if not members:
        raise UserError(f"{path} contains no image ({', '.join(IMAGE_EXTENSIONS)}).")
    ids = choose_ids(choose_layout(members, image_size), path, numbered)
    return Source(path, sorted(ids, key=ids.get), sorted(ids.values()))


def list_folder(path: Path) -> list[Member]:
    """List the image files in a folder and its subfolders, or the images in its archives.

    The archives are the shards of one set. They are read if there are not more image files, such as
    a single preview.
    """
    images = []
    archives = []
    visited = set()

    def fail(error):
        raise error

    # Links are followed, because a data folder is often a link to another disk. A link may lead to
    # a folder that is read anyway, such as one above it, so each real folder is read once.
    for folder, inner, files in os.walk(path, onerror=fail, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:
            inner.clear()
            continue
        visited.add(real)
        inner.sort()
        for file in map(Path(folder).joinpath, files):
            name = file.relative_to(path).as_posix()
            if is_image_name(name):
                images.append(file)
            elif file.suffix.lower() in ARCHIVES and not is_hidden(name):
                archives.append(file)

    if len(archives) >= len(images):
        return list_archives(sorted(archives), path)
    return [
        Member(file.relative_to(path).as_posix(), stamp_of(file), file.read_bytes)
        for file in images
    ]


def stamp_of(file: Path) -> tuple[int, int]:
    """Return the size of a file in bytes, and its modification time in ns."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def list_archives(archives: list[Path], root: Path) -> list[Member]:
    """List the images in archives, the shards of one set, at or below the path `root`.

    Raises UserError, which names the archive, when one of them cannot be read.
    """
    members = []
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
    return members


def list_zip(path: Path) -> list[Member]:
    """List the files in a zip."""
    archive = zipfile.ZipFile(path)
    # Some Windows tools write zips with backslashes.
    return [
        Member(info.filename.replace("\\", "/"), info.CRC, partial(archive.read, info))
        for info in archive.infolist()
    ]


def list_tar(path: Path) -> list[Member]:
    """List the files in a plain tar, such as a shard of a WebDataset."""
    archive = tarfile.TarFile(path)

    def read(info):
        # A link has the content of the file that it leads to.
        return archive.extractfile(info).read()

    # A tar has no checksums of its members' contents.
    stamp = stamp_of(path)
    members = [Member(info.name, stamp, partial(read, info)) for info in archive]
    # At a damaged header tarfile stops without an error. An intact tar ends with zeros.
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("a header is damaged, or the end is missing")
    return members


def list_npz(path: Path) -> list[Member]:
    """List the rows of the one uint8 array (N, H, W, 3) or (N, H, W, 1). All is kept in memory."""
    arrays = [
        array
        for array in np.load(path).values()
        if array.dtype == np.uint8 and array.shape[3:] in ((1,), (3,))
    ]
    if len(arrays) != 1:
        raise ValueError(f"it has {len(arrays)} uint8 arrays (N, H, W, 3 or 1), and must have one")
    stamp = stamp_of(path)
    return [Member(None, stamp, row.copy) for row in arrays[0]]


def list_parquet(path: Path) -> list[Member]:
    """List the rows of the one column of encoded images, as Hugging Face's `Image` stores them.

    Raises UserError if pyarrow is not installed.
    """
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{path} needs pyarrow: python -m pip install pyarrow") from None
    file = ParquetFile(path)
    # Such a column is a struct of `bytes` and `path`.
    columns = [column.path for column in file.schema if column.path.endswith(".bytes")]
    if len(columns) != 1:
        raise ValueError(f"it has {len(columns)} columns of encoded images, and must have one")

    def read(i):
        return read_column(file, columns[0])[i].as_py()["bytes"]

    stamp = stamp_of(path)
    return [Member(None, stamp, partial(read, i)) for i in range(file.metadata.num_rows)]


# Only the newest column is kept in memory, because a set may have many shards.
@lru_cache(maxsize=1)
def read_column(file: Any, column: str) -> Sequence:
    """Return a column of a `ParquetFile`."""
    return file.read([column]).column(0)


# These functions list the images in files with these suffixes, in upper or lower case.
ARCHIVES = {".zip": list_zip, ".tar": list_tar, ".npz": list_npz, ".parquet": list_parquet}


def choose_layout(members: list[Member], image_size: int) -> list[Member]:
    """Return the members of one of several copies of FFHQ, or all if there are not several."""
    folders = {folder for member in members for folder in member.name.split("/")[:-1]}
    layouts = [layout for layout in FFHQ_LAYOUTS if layout in folders]
    if len(layouts) < 2:
        return members
    # FFHQ_LAYOUTS goes from small to large. If no copy is large enough, the largest is chosen.
    large = [layout for layout in layouts if FFHQ_LAYOUTS[layout] >= image_size]
    chosen = (large or layouts[-1:])[0]
    print(f"Found {' and '.join(layouts)}; using {chosen} only.")
    return [member for member in members if chosen in member.name.split("/")]


def choose_ids(members: list[Member], path: Path, numbered: bool) -> dict:
    """Return the id of each member, without strays among numbered members."""
    names = {member: NUMBERED_NAME.fullmatch(member.name) for member in members}

    # The names of FFHQ's files are a number, or "img" and a number.
    ffhq = {member: name for member, name in names.items() if name and name[1] in ("", "img")}
    strays = len(names) - len(ffhq)
    if strays and ffhq and (numbered or strays <= FEW * len(names)):
        print(f"Skipping {strays} image(s) of {path} without a number in the name.")
        names = ffhq

    # The ids are the numbers if every name has one and no number occurs twice. Unless the set must
    # be `numbered`, all prefixes must also be the same. Otherwise the ids are the names.
    if all(names.values()):
        ids = {member: int(name[2]) for member, name in names.items()}
        once = len(set(ids.values())) == len(ids)
        if once and (numbered or len({name[1] for name in names.values()}) == 1):
            return ids
        if numbered:
            raise UserError(f"{path}: two images have one number. Keep one copy of the set there.")
    return {member: member.name for member in names}


def is_image_name(name: str) -> bool:
    """Return whether a path inside a source has an image's extension and is not hidden."""
    return name.lower().endswith(IMAGE_EXTENSIONS) and not is_hidden(name)


def is_hidden(name: str) -> bool:
    """Return whether a path inside a source is hidden, or macOS's metadata of another file."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
