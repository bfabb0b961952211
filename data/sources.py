"""Find images in a folder and its subfolders, in a zip, a tar or an npz.

Archives are read in place and never extracted, so the name of a member never becomes a path on
this machine.
"""

import math
import os
import re
import stat
import tarfile
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

# Each of these folders contains a copy of FFHQ, with images of this side in pixels. All copies use
# the same image numbers, so only one of them is read. The uncropped photos have no common size.
# Their 0 makes them the last choice.
FFHQ_LAYOUTS = {
    "in-the-wild-images": 0,
    "thumbnails128x128": 128,
    "resized": 256,
    "images1024x1024": 1024,
}

# A larger image file counts as unusable. An FFHQ photo at 1024 px is about 1.3 MB.
MAX_FILE_BYTES = 100 * 2**20

# If at least this fraction of a set's images is numbered, the others are strays and are skipped.
NEARLY_ALL = 0.99


class Member(NamedTuple):
    # The name is the path inside the source, exactly as stored.
    name: str
    # The size is in bytes, uncompressed.
    size: int
    # The stamp changes when the content does. It is the CRC-32 in an archive, and the modification
    # time (ns) in a folder.
    stamp: int


class Source:
    """The images at a path. Each format has a class; `find_source` chooses it.

    A class has its `kind`, which is part of a pack's key. `members` are the image files, or the
    files that contain all images: the array of an npz, the six files of CIFAR-10. `ids` has one id
    for each image, sorted, all int or all str. A class whose members are the images leaves `ids` to
    `find_source` and defines `read_file`. Any other class sets `ids` and defines `read`. `notes`
    are sentences to print about files that were not used.

    `read` is called with 0, 1, 2, ... in this order, by one thread, so a source may be a stream.
    """

    # A pack is next to its source, or inside it if this is True, so that a moved folder keeps its
    # pack.
    holds_pack = False
    # Images with this id or a larger one are test images. None means that there are none.
    first_test_id = None
    # Images are converted to this number of channels, RGB or grey, after they are read.
    channels = 3

    def __init__(self, path: Path):
        self.path = path
        self.members = []
        self.ids = []
        self.notes = []

    def read(self, i: int) -> bytes | np.ndarray | BadImage:
        """Read the i-th image.

        Returns a file's bytes, or uint8 (H, W, C), or the reason why it cannot be read.
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
        """Name the i-th image in messages: by its file, or by its id if its file has several."""
        if len(self.members) == len(self.ids):
            return self.members[i].name
        return f"image {self.ids[i]}"


class Folder(Source):
    """Image files in a folder and its subfolders."""

    kind = "folder"
    holds_pack = True

    def __init__(self, path: Path):
        super().__init__(path)

        def fail(error):
            raise error

        # Links are followed, because a data folder is often a link to another disk.
        for folder, inner, files in os.walk(path, onerror=fail, followlinks=True):
            # Such a folder may vanish: `is_writable` in another process makes and deletes them.
            inner[:] = [name for name in inner if not name.startswith(".packed")]
            for file in files:
                name = Path(folder, file).relative_to(path).as_posix()
                if not is_image_name(name):
                    continue
                try:
                    status = os.stat(path / name)
                    # Reading a pipe could block forever.
                    if stat.S_ISREG(status.st_mode):
                        self.members.append(Member(name, status.st_size, status.st_mtime_ns))
                except OSError:
                    # A broken link stays a member. Reading it gives a bad image, so its name is
                    # listed.
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

        # If two members have the same name, the last one counts, as in other zip tools.
        infos = {info.filename: info for info in self.archive.infolist()}
        for name, info in infos.items():
            if is_image_name(name):
                self.members.append(Member(name, info.file_size, info.CRC))

    def read_file(self, member: Member) -> bytes:
        """Return the bytes of a member, at most one byte more than its size."""
        with open_member(self.archive, member.name) as file:
            # Without a limit, read() would unpack a bomb, whatever size it claims. Asking for one
            # byte more than the size reaches the end of an intact member, where zipfile checks the
            # CRC.
            return file.read(member.size + 1)


class Tar(Source):
    """Image files in a plain tar, such as a shard of a WebDataset."""

    kind = "tar"

    def __init__(self, path: Path):
        super().__init__(path)
        self.archive = tarfile.TarFile(path)
        # A tar has no checksums of its members' contents.
        stamp = path.stat().st_mtime_ns

        # If two members have the same name, the last one counts, as in other tar tools.
        self.infos = {info.name: info for info in self.archive if info.isfile()}
        # At a damaged header tarfile stops without an error. An intact tar ends with zeros.
        self.archive.fileobj.seek(self.archive.offset)
        if self.archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("a header is damaged, or the end is missing")
        for name, info in self.infos.items():
            if is_image_name(name):
                self.members.append(Member(name, info.size, stamp))

    def read_file(self, member: Member) -> bytes:
        """Return the bytes of a member."""
        # Looking a member up by its name would take as long as reading the whole list.
        return self.archive.extractfile(self.infos[member.name]).read()


class Npz(Source):
    """One uint8 array (N, H, W, C), read as a stream, as FFHQ at 1024 px does not fit in memory.

    C is 3, or 1 if there is no such array with C = 3. The last of the N reads checks the CRC.
    """

    kind = "npz"

    def __init__(self, path: Path):
        super().__init__(path)
        self.archive = zipfile.ZipFile(path)
        arrays = []
        for info in self.archive.infolist():
            if info.filename.endswith(".npy"):
                with open_member(self.archive, info.filename) as file:
                    # The header of a plain array has version 1.0.
                    plain = npy.read_magic(file) == (1, 0)
                    shape, fortran, dtype = npy.read_array_header_1_0(file)
                    header = file.tell()
                fits = len(shape) == 4 and shape[3] in (1, 3) and min(shape) > 0
                if plain and fits and dtype == np.uint8 and not fortran:
                    arrays.append((info, shape, header))
        # Next to colour images, an array with one channel may have their masks.
        arrays = [array for array in arrays if array[1][3] == 3] or arrays
        if len(arrays) != 1:
            raise UserError(
                f"{path} must contain exactly one uint8 array of shape (N, H, W, 3), or of shape "
                f"(N, H, W, 1) for grey images. It contains {len(arrays)}."
            )

        info, shape, self.header = arrays[0]
        count, *self.shape = shape
        self.members = [Member(info.filename, info.file_size, info.CRC)]

        # The header may claim any shape, so it is compared with the number of bytes in the file
        # before a list or an array of this length is made.
        self.image_bytes = math.prod(self.shape)
        too_large = self.image_bytes > 3 * MAX_PIXELS
        if too_large or count * self.image_bytes != info.file_size - self.header:
            raise UserError(
                f"{path} is damaged: its array's size differs from its header or is impossible."
            )
        self.ids = list(range(count))

    def read(self, i: int) -> np.ndarray:
        """Read the i-th image, uint8 (H, W, C). Images must be read in order."""
        with raise_user_error(self.path):
            if i == 0:
                self.stream = open_member(self.archive, self.members[0].name)
                self.stream.read(self.header)
            pixels = np.frombuffer(self.stream.read(self.image_bytes), np.uint8)
            return pixels.reshape(self.shape)


# These classes read the files with these suffixes, in upper or lower case.
ARCHIVES = {".zip": Zip, ".npz": Npz, ".tar": Tar}


def find_source(path: str | os.PathLike, image_size: int, numbered: bool = False) -> Source:
    """Find the images at a path, and sort them by their ids.

    The ids do not depend on the order in which a folder lists its files. If the ids are numbers,
    they do not depend on the files' folders either. If there are several copies of FFHQ, the
    smallest that need not be enlarged to `image_size` (pixels) is read. In a set that must be
    `numbered`, unnumbered images are skipped with a note, and two images with the same number are
    an error. In any other set, unnumbered images are skipped if they are few, such as a stray
    preview.png among 70,000 images.

    Raises UserError when the path is missing or in an unknown home folder, is neither a folder nor
    one of `ARCHIVES`, cannot be read or contains no image.
    """
    try:
        path = Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: this home folder is unknown. Give the path without ~.") from None
    if not path.exists():
        raise UserError(f"{path} does not exist. Give a folder, a .zip, .tar or .npz of images.")
    source_class = Folder if path.is_dir() else ARCHIVES.get(path.suffix.lower())
    if not source_class:
        raise UserError(f"{path} is neither a folder nor a .zip, .tar or .npz. Give one of these.")

    with raise_user_error(path):
        source = source_class(path)
    if not source.ids:
        choose_layout(source, image_size)
        put_in_order(source, numbered)
    return source


def choose_layout(source: Source, image_size: int) -> None:
    """Keep one of several copies of FFHQ."""
    folders = {member: with_slashes(member.name).split("/")[:-1] for member in source.members}
    all_folders = set().union(*folders.values())
    layouts = [layout for layout in FFHQ_LAYOUTS if layout in all_folders]
    if len(layouts) > 1:
        # FFHQ_LAYOUTS goes from small to large. If no copy is large enough, the loop ends with the
        # largest.
        for layout in layouts:
            if FFHQ_LAYOUTS[layout] >= image_size:
                break
        source.members = [member for member in source.members if layout in folders[member]]
        source.notes.append(f"Found {' and '.join(layouts)}; used {layout} only.")


def put_in_order(source: Source, numbered: bool) -> None:
    """Drop strays among numbered members, give the other members their ids, and sort by these."""
    stems = {member: split_stem(member.name) for member in source.members}

    # The names of FFHQ's files are a number, or "img" and a number.
    ffhq_stems = {member: stem for member, stem in stems.items() if stem and stem[0] in ("", "img")}
    strays = stems.keys() - ffhq_stems.keys()
    if strays and (numbered or len(ffhq_stems) >= NEARLY_ALL * len(stems)):
        first = short(min(strays).name)
        source.notes.append(
            f"Skipped {len(strays)} without an image number in the name; the first is {first!r}."
        )
        stems = ffhq_stems
    if not stems:
        reason = f"{source.path} contains no image ({', '.join(IMAGE_EXTENSIONS)})."
        raise UserError(" ".join([reason, *source.notes]))

    # The ids are the numbers if every name has one and no number occurs twice. Unless the set must
    # be `numbered`, all prefixes must also be the same. Otherwise the ids are the names.
    ids = {member: with_slashes(member.name) for member in stems}
    if all(stems.values()):
        prefixes, numbers = zip(*stems.values(), strict=True)
        number, count = Counter(numbers).most_common(1)[0]
        if count == 1 and (numbered or len(set(prefixes)) == 1):
            ids = dict(zip(stems, numbers, strict=True))
        elif numbered:
            raise UserError(
                f"{source.path}: {count} images have the number {number}. Keep only one copy of "
                "the set there."
            )
    source.members = sorted(ids, key=ids.get)
    source.ids = sorted(ids.values())


def is_image_name(name: str) -> bool:
    """Return whether a path inside a source has an image's extension and is not hidden."""
    # macOS puts files of metadata, with the names of the images, into __MACOSX.
    parts = PurePosixPath(with_slashes(name)).parts
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return name.lower().endswith(IMAGE_EXTENSIONS) and not hidden


def with_slashes(name: str) -> str:
    """Return a path inside a source with slashes instead of backslashes."""
    # Some Windows tools write zips with backslashes.
    return name.replace("\\", "/")


def split_stem(name: str) -> tuple[str, int] | None:
    """Split a file's name into a prefix and a number. Returns None for names of another form.

    x/img00000012.png gives ("img", 12).
    """
    stem = PurePosixPath(with_slashes(name)).stem
    match = re.fullmatch(r"([A-Za-z_-]*)(\d{1,18})", stem)
    return (match[1], int(match[2])) if match else None


@contextmanager
def raise_user_error(path: Path) -> Iterator[None]:
    """Turn the errors of an unreadable or broken source into a UserError of one sentence."""
    try:
        yield
    except READ_ERRORS as error:
        raise UserError(
            f"{path} cannot be read ({short(error)}). Was its download cut short?"
        ) from None


def open_member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    """Open a member of a zip. Raises NotImplementedError unless it is stored or deflated."""
    # For other compression methods, Python's reader unpacks a whole member, whatever its size.
    if archive.getinfo(name).compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise NotImplementedError("compressed by a method other than deflate")
    return archive.open(name)
