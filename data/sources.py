"""Where images come from: a folder with its subfolders, a zip or an npz.

Archives are read in place and never extracted, so a member's name is no path on this machine, whatever it says.
"""

import math
import os
import re
import stat
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

import numpy as np
from numpy.lib import format as npy

from data.decode import BROKEN_BYTES, MAX_PIXELS, BadImage
from functions.support.errors import UserError
from functions.support.files import short

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

# Folders of the known copies of FFHQ and the pixel size of what is in them. Every one numbers its images alike, so
# when several lie under one root only one may be read. The uncropped photos (0) are never chosen over aligned ones.
FFHQ_LAYOUTS = {
    "in-the-wild-images": 0,
    "thumbnails128x128": 128,
    "resized": 256,
    "images1024x1024": 1024,
}

MAX_FILE_BYTES = 100 * 2**20  # of one image: an FFHQ photo at 1024 px takes 1.3 MB
# Of a set's images: so many numbered ones make it a numbered set, and the others strays
NEARLY_ALL = 0.99


class Member(NamedTuple):
    name: str  # its path inside the source, exactly as stored
    size: int  # bytes, uncompressed
    # What changes when the content does: the CRC-32 in an archive, the modification time (ns) in a
    # folder
    stamp: int


class Source:
    """What the three kinds have in common; each has its `kind`, lists its `members`, and reads one by `read_file`.

    `members` are the image files in the order of their ids; for an npz the one array that holds all images. `ids` are
    the numbers in the file names (int) when these are numbered as FFHQ's are, else the names (str); sorted. `notes`
    are sentences to be printed: what was passed over, and why.
    """

    def __init__(self, path: Path):
        self.path, self.members, self.ids, self.notes = path, [], [], []

    def read(self, i: int) -> bytes | np.ndarray | BadImage:
        """Read the i-th image: a file's bytes, or uint8 (H, W, 3), or the reason why it cannot be read."""
        if self.members[i].size > MAX_FILE_BYTES:
            return BadImage(f"larger than {MAX_FILE_BYTES // 2**20} MiB")
        try:
            return self.read_file(self.members[i])
        except BROKEN_BYTES as error:
            return BadImage(f"cannot be read ({short(getattr(error, 'strerror', None) or error)})")


class Folder(Source):
    """Image files in a folder. Links are followed, for a data folder is often a link to another disk."""

    kind = "folder"

    def __init__(self, path: Path):
        super().__init__(path)
        errors = []
        for folder, _, files in os.walk(path, onerror=errors.append, followlinks=True):
            names = ((Path(folder) / file).relative_to(path).as_posix() for file in files)
            for name in filter(is_image_name, names):
                try:
                    status = os.stat(path / name)
                    if stat.S_ISREG(status.st_mode):  # a pipe would be waited for
                        self.members.append(Member(name, status.st_size, status.st_mtime_ns))
                except OSError:  # a link that leads nowhere, which is named when it is read
                    self.members.append(Member(name, 0, 0))
        if errors:
            raise errors[0]

    def read_file(self, member: Member) -> bytes:
        return (self.path / member.name).read_bytes()


class Zip(Source):
    """Image files in a zip. Of two members with one name the last counts, as for every other zip tool."""

    kind = "zip"

    def __init__(self, path: Path):
        super().__init__(path)
        self.archive = zipfile.ZipFile(path)
        images = {
            info.filename: info for info in self.archive.infolist() if is_image_name(info.filename)
        }
        self.members = [Member(name, info.file_size, info.CRC) for name, info in images.items()]

    def read_file(self, member: Member) -> bytes:
        with open_member(self.archive, member.name) as file:
            # Bounded, for read() unpacks all there is, whatever the size it should have. Reaching that checks the CRC.
            return file.read(member.size + 1)


class Npz(Source):
    """One uint8 array (N, H, W, 3), streamed: the full set's at 1024 px would not fit into memory.

    So `read` takes 0, 1, ..., N - 1 in this order; the last one checks the CRC.
    """

    kind = "npz"

    def __init__(self, path: Path):
        super().__init__(path)
        self.archive, found = zipfile.ZipFile(path), []
        for info in self.archive.infolist():
            if info.filename.endswith(".npy"):
                with open_member(self.archive, info.filename) as file:
                    plain = npy.read_magic(file) == (1, 0)  # the version that all plain arrays have
                    shape, fortran, dtype = npy.read_array_header_1_0(file)
                    header = file.tell()
                if (
                    plain
                    and dtype == np.uint8
                    and len(shape) == 4
                    and shape[3] == 3
                    and min(shape) > 0
                    and not fortran
                ):
                    found.append((Member(info.filename, info.file_size, info.CRC), shape, header))
        if len(found) != 1:
            raise UserError(
                f"{path} must hold exactly one uint8 array of shape (N, H, W, 3). It holds {len(found)}."
            )
        member, (count, *self.shape), self.header = found[0]
        # Before anything is counted by it: the header can claim any number of images, of any size.
        if (
            count * math.prod(self.shape) != member.size - self.header
            or math.prod(self.shape) > 3 * MAX_PIXELS
        ):
            raise UserError(
                f"{path} is damaged: its array is not as large as it says, or impossibly large."
            )
        self.members, self.ids = [member], list(range(count))

    def read(self, i: int) -> np.ndarray:
        with one_sentence(self.path):
            if i == 0:
                self.stream = open_member(self.archive, self.members[0].name)
                self.stream.read(self.header)
            return np.frombuffer(self.stream.read(math.prod(self.shape)), np.uint8).reshape(
                self.shape
            )


def find_source(path: str | os.PathLike, image_size: int, numbered: bool = False) -> Source:
    """Find the images of a folder, a .zip or an .npz, and put them into the order of their ids.

    Ids don't depend on the order of a directory, and numbers don't depend on the folders that they lie in. Of several
    copies of FFHQ under one root, the smallest that need not be enlarged to `image_size` (pixels) is read. In a set
    that must be `numbered`, unnumbered images are passed over with a note, and two with one number are an error. They
    are passed over too where nearly all others are numbered, as a stray preview.png among 70,000 is.
    Raises UserError when the path is missing, is none of the three, cannot be read or holds no image.
    """
    path = Path(path).expanduser()
    kind = Folder if path.is_dir() else {".zip": Zip, ".npz": Npz}.get(path.suffix.lower())
    if not path.exists():
        raise UserError(f"{path} does not exist. Give a folder, a .zip or an .npz of images.")
    if kind is None:
        raise UserError(f"{path} is neither a folder nor a .zip nor an .npz. Give one of these.")
    with one_sentence(path):
        source = kind(path)
    if kind is not Npz:
        choose_layout(source, image_size)
        put_in_order(source, numbered)
    return source


def choose_layout(source: Source, image_size: int) -> None:
    """Keep one of several copies of FFHQ."""
    layouts = {
        m.name: FFHQ_LAYOUTS.keys() & set(with_slashes(m.name).split("/")[:-1])
        for m in source.members
    }
    found = sorted(set().union(*layouts.values()), key=FFHQ_LAYOUTS.get)
    if len(found) > 1:
        chosen = next((layout for layout in found if FFHQ_LAYOUTS[layout] >= image_size), found[-1])
        source.members = [member for member in source.members if chosen in layouts[member.name]]
        source.notes.append(f"Found {' and '.join(found)}; used {chosen} only.")


def put_in_order(source: Source, numbered: bool) -> None:
    """Give the members their ids, without the strays among numbered ones, and sort them by these."""
    numbers = {member: number_in(member.name) for member in source.members}
    plain = {
        member: number for member, number in numbers.items() if number and number[0] in ("", "img")
    }
    if len(plain) < len(numbers) and (numbered or len(plain) >= NEARLY_ALL * len(numbers)):
        strays = numbers.keys() - plain.keys()
        first = short(min(strays).name)
        source.notes.append(
            f"Passed over {len(strays)} (no image number in the name), the first is {first!r}."
        )
        numbers = plain
    if not numbers:
        raise UserError(
            " ".join(
                [f"{source.path} holds no image ({', '.join(IMAGE_EXTENSIONS)}).", *source.notes]
            )
        )

    ids = {member: with_slashes(member.name) for member in numbers}
    if all(numbers.values()) and (numbered or len({prefix for prefix, _ in numbers.values()}) == 1):
        number, times = Counter(number for _, number in numbers.values()).most_common(1)[0]
        if times == 1:
            ids = {member: number for member, (_, number) in numbers.items()}
        elif numbered:
            raise UserError(
                f"{source.path}: {times} images have the number {number}. Keep one copy of the set there."
            )
    source.members = sorted(ids, key=ids.get)
    source.ids = [ids[member] for member in source.members]


def is_image_name(name: str) -> bool:
    """Whether a path inside a source is taken for an image: by its extension, unless it is hidden or macOS' shadow."""
    hidden = any(
        part.startswith(".") or part == "__MACOSX"
        for part in PurePosixPath(with_slashes(name)).parts
    )
    return name.lower().endswith(IMAGE_EXTENSIONS) and not hidden


def with_slashes(name: str) -> str:
    return name.replace("\\", "/")  # some Windows tools write zips with backslashes


def number_in(name: str) -> tuple[str, int] | None:
    """The prefix and the number that a file's name consists of: ("img", 12) for x/img00000012.png."""
    match = re.fullmatch(r"([A-Za-z_-]*)(\d{1,18})", PurePosixPath(with_slashes(name)).stem)
    return match and (match[1], int(match[2]))


@contextmanager
def one_sentence(path: Path) -> Iterator[None]:
    """Turn whatever an unreadable or broken source raises into a UserError of one sentence."""
    try:
        yield
    except BROKEN_BYTES as error:
        raise UserError(
            f"{path} cannot be read ({short(error)}). Was its download cut short?"
        ) from None


def open_member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    """Open a member for reading. Python's readers of other methods unpack all at once, however much that is."""
    if archive.getinfo(name).compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise NotImplementedError("packed by another method than deflate")
    return archive.open(name)
