"""Where images come from: a folder with its subfolders, a zip or an npz.

Archives are read in place and never extracted, so a member's name is no path on this machine,
whatever it says.
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

from data.decode import MAX_PIXELS, BadImage
from functions.support.errors import UserError
from functions.support.files import READ_ERRORS, short

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

# The known copies of FFHQ lie in these folders, with images of so many pixels, from small to
# large. Every copy numbers its images alike, so when several lie under one root only one may be
# read. The uncropped photos (0) are never chosen over aligned ones.
FFHQ_LAYOUTS = {
    "in-the-wild-images": 0,
    "thumbnails128x128": 128,
    "resized": 256,
    "images1024x1024": 1024,
}

# No image file may be larger than this. An FFHQ photo at 1024 px takes 1.3 MB.
MAX_FILE_BYTES = 100 * 2**20

# If this part of a set's images is numbered, the set counts as numbered and the others as strays.
NEARLY_ALL = 0.99


class Member(NamedTuple):
    # This is the path inside the source, exactly as stored.
    name: str
    # The size is in bytes, uncompressed.
    size: int
    # The stamp changes when the content does: it is the CRC-32 in an archive, and the modification
    # time (ns) in a folder.
    stamp: int


class Source:
    """What the kinds of sources have in common.

    Each has its `kind`, lists its `members`, and reads one of them by `read_file`. `members` are
    the image files in the order of their ids, or the fewer files that hold all images: an npz's
    array, the six of CIFAR-10. `ids` are the numbers in the file names (int) when these are
    numbered as FFHQ's are, else the names (str); sorted, one for each image. `notes` are sentences
    to be printed: what was passed over, and why.

    `read` is called with 0, 1, 2, ... in this order, by one thread, so a source may be a stream.
    """

    def __init__(self, path: Path):
        self.path = path
        self.members = []
        self.ids = []
        self.notes = []

    def read(self, i: int) -> bytes | np.ndarray | BadImage:
        """Read the i-th image.

        Returns a file's bytes, or uint8 (H, W, 3), or the reason why it cannot be read.
        """
        member = self.members[i]
        if member.size > MAX_FILE_BYTES:
            return BadImage(f"larger than {MAX_FILE_BYTES // 2**20} MiB")
        try:
            return self.read_file(member)
        except READ_ERRORS as error:
            reason = getattr(error, "strerror", None) or error
            return BadImage(f"cannot be read ({short(reason)})")

    def name_of(self, i: int) -> str:
        """Name the i-th image to people: by its file, or by its id where files hold many."""
        if len(self.members) == len(self.ids):
            return self.members[i].name
        return f"image {self.ids[i]}"


class Folder(Source):
    """Image files in a folder and its subfolders."""

    kind = "folder"

    def __init__(self, path: Path):
        super().__init__(path)

        def fail(error):
            raise error

        # Links are followed, because a data folder is often a link to another disk.
        for folder, inner, files in os.walk(path, onerror=fail, followlinks=True):
            # Another process may be trying whether it can write here, and its folder vanishes.
            inner[:] = [name for name in inner if not name.startswith(".packed")]
            for file in files:
                name = Path(folder, file).relative_to(path).as_posix()
                if not is_image_name(name):
                    continue
                try:
                    status = os.stat(path / name)
                    # Whoever reads a pipe waits for its other end, perhaps for ever.
                    if stat.S_ISREG(status.st_mode):
                        self.members.append(Member(name, status.st_size, status.st_mtime_ns))
                except OSError:
                    # A link that leads nowhere is kept: it becomes a bad image when it is read,
                    # and so its name is listed.
                    self.members.append(Member(name, 0, 0))

    def read_file(self, member: Member) -> bytes:
        """Return the bytes of a member."""
        return (self.path / member.name).read_bytes()


class Zip(Source):
    """Image files in a zip."""

    kind = "zip"

    def __init__(self, path: Path):
        super().__init__(path)
        self.archive = zipfile.ZipFile(path)

        # Of two members with one name the last counts, as for every other zip tool.
        infos = {info.filename: info for info in self.archive.infolist()}
        for name, info in infos.items():
            if is_image_name(name):
                self.members.append(Member(name, info.file_size, info.CRC))

    def read_file(self, member: Member) -> bytes:
        """Return the bytes of a member, at most one more than it should have."""
        with open_member(self.archive, member.name) as file:
            # A read() without a limit would unpack all there is, whatever the size should be.
            # Reading one byte more than that reaches the end, where zipfile compares the CRC.
            return file.read(member.size + 1)


class Npz(Source):
    """One uint8 array (N, H, W, 3), streamed: the full set's at 1024 px would not fit into memory.

    So `read` takes 0, 1, ..., N - 1 in this order; the last one checks the CRC.
    """

    kind = "npz"

    def __init__(self, path: Path):
        super().__init__(path)
        self.archive = zipfile.ZipFile(path)
        arrays = []
        for info in self.archive.infolist():
            if info.filename.endswith(".npy"):
                with open_member(self.archive, info.filename) as file:
                    # All plain arrays have version 1.0 of the header.
                    plain = npy.read_magic(file) == (1, 0)
                    shape, fortran, dtype = npy.read_array_header_1_0(file)
                    header = file.tell()
                rgb = len(shape) == 4 and shape[3] == 3 and min(shape) > 0
                if plain and rgb and dtype == np.uint8 and not fortran:
                    arrays.append((info, shape, header))
        if len(arrays) != 1:
            raise UserError(
                f"{path} must hold exactly one uint8 array of shape (N, H, W, 3). It holds "
                f"{len(arrays)}."
            )

        info, shape, self.header = arrays[0]
        count, *self.shape = shape
        self.members = [Member(info.filename, info.file_size, info.CRC)]

        # The header can claim any number of images, of any size, so its claim is compared with the
        # bytes there are before anything of that length is made.
        self.image_bytes = math.prod(self.shape)
        too_large = self.image_bytes > 3 * MAX_PIXELS
        if too_large or count * self.image_bytes != info.file_size - self.header:
            raise UserError(
                f"{path} is damaged: its array is not as large as it says, or impossibly large."
            )
        self.ids = list(range(count))

    def read(self, i: int) -> np.ndarray:
        """Read the i-th image, uint8 (H, W, 3), right after the one before it."""
        with one_sentence(self.path):
            if i == 0:
                self.stream = open_member(self.archive, self.members[0].name)
                self.stream.read(self.header)
            pixels = np.frombuffer(self.stream.read(self.image_bytes), np.uint8)
            return pixels.reshape(self.shape)


def find_source(path: str | os.PathLike, image_size: int, numbered: bool = False) -> Source:
    """Find the images of a folder, a .zip or an .npz, and put them into the order of their ids.

    Ids don't depend on the order of a directory, and numbers don't depend on the folders that they
    lie in. Of several copies of FFHQ under one root, the smallest that need not be enlarged to
    `image_size` (pixels) is read. In a set that must be `numbered`, unnumbered images are passed
    over with a note, and two with one number are an error. They are passed over too where nearly
    all others are numbered, as a stray preview.png among 70,000 is.

    Raises UserError when the path is missing, is none of the three, cannot be read or holds no
    image.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"{path} does not exist. Give a folder, a .zip or an .npz of images.")
    archive_kinds = {".zip": Zip, ".npz": Npz}
    kind = Folder if path.is_dir() else archive_kinds.get(path.suffix.lower())
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
    folders = {member: with_slashes(member.name).split("/")[:-1] for member in source.members}
    all_folders = set().union(*folders.values())
    layouts = [layout for layout in FFHQ_LAYOUTS if layout in all_folders]
    if len(layouts) > 1:
        # The search goes from small to large. If no copy is large enough, it ends with the largest.
        for chosen in layouts:
            if FFHQ_LAYOUTS[chosen] >= image_size:
                break
        source.members = [member for member in source.members if chosen in folders[member]]
        source.notes.append(f"Found {' and '.join(layouts)}; used {chosen} only.")


def put_in_order(source: Source, numbered: bool) -> None:
    """Pass over the strays among numbered members, give the rest their ids, and sort by these."""
    numbers = {member: number_in(member.name) for member in source.members}

    # FFHQ's files are named by a number alone, or by "img" and a number.
    plain = {
        member: number for member, number in numbers.items() if number and number[0] in ("", "img")
    }
    strays = numbers.keys() - plain.keys()
    if strays and (numbered or len(plain) >= NEARLY_ALL * len(numbers)):
        first = short(min(strays).name)
        source.notes.append(
            f"Passed over {len(strays)} (no image number in the name), the first is {first!r}."
        )
        numbers = plain
    if not numbers:
        reason = f"{source.path} holds no image ({', '.join(IMAGE_EXTENSIONS)})."
        raise UserError(" ".join([reason, *source.notes]))

    # The names are ids unless all have numbers, of one series, of which none comes twice.
    ids = {member: with_slashes(member.name) for member in numbers}
    if all(numbers.values()):
        prefixes, without_prefix = zip(*numbers.values(), strict=True)
        number, times = Counter(without_prefix).most_common(1)[0]
        if times == 1 and (numbered or len(set(prefixes)) == 1):
            ids = {member: number for member, (_, number) in numbers.items()}
        elif numbered:
            raise UserError(
                f"{source.path}: {times} images have the number {number}. Keep one copy of the set "
                "there."
            )
    source.members = sorted(ids, key=ids.get)
    source.ids = [ids[member] for member in source.members]


def is_image_name(name: str) -> bool:
    """Return whether a path inside a source has an image's extension and is not hidden."""
    # macOS puts shadows of files into __MACOSX.
    parts = PurePosixPath(with_slashes(name)).parts
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return name.lower().endswith(IMAGE_EXTENSIONS) and not hidden


def with_slashes(name: str) -> str:
    """Return a path inside a source with slashes only."""
    # Some Windows tools write zips with backslashes.
    return name.replace("\\", "/")


def number_in(name: str) -> tuple[str, int] | None:
    """Return the prefix and the number that a file's name consists of, or None for other names.

    They are ("img", 12) for x/img00000012.png.
    """
    stem = PurePosixPath(with_slashes(name)).stem
    match = re.fullmatch(r"([A-Za-z_-]*)(\d{1,18})", stem)
    return (match[1], int(match[2])) if match else None


@contextmanager
def one_sentence(path: Path) -> Iterator[None]:
    """Turn whatever an unreadable or broken source raises into a UserError of one sentence."""
    try:
        yield
    except READ_ERRORS as error:
        raise UserError(
            f"{path} cannot be read ({short(error)}). Was its download cut short?"
        ) from None


def open_member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    """Open a member of a zip for reading. Raises NotImplementedError for methods but deflate."""
    # Python's readers of other methods unpack all at once, however much that is.
    if archive.getinfo(name).compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise NotImplementedError("packed by another method than deflate")
    return archive.open(name)
