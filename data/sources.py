"""Finding the images of a data set: in a folder, in a zip (read in place) or in an npz; and the ids that order them."""

import math
import os
import re
import stat
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from functions.support.errors import UserError

from .archives import open_archive, open_member, printable, read_npy_header

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

# Folders of the known copies of FFHQ and the pixel size of what is in them. Every one numbers its images alike, so
# when several lie under one root only one may be read. The uncropped photos (0) are never chosen over aligned ones.
FFHQ_LAYOUTS = {"in-the-wild-images": 0, "thumbnails128x128": 128, "resized": 256, "images1024x1024": 1024}


MAX_PIXELS = 89_478_485  # of one image: Pillow's limit for files, which counts for arrays too

NEARLY_ALL = 0.99  # of a set's images: so many numbered ones make it a numbered set, and the others strays


@dataclass(frozen=True)
class Member:
    """One file of a source."""

    name: str  # its path inside the source, exactly as stored
    size: int  # bytes, uncompressed
    stamp: int  # what changes when the content does: the CRC-32 in an archive, the modification time (ns) in a folder


@dataclass(frozen=True)
class Source:
    """Where images come from.

    `members` are the image files in the order of their ids; for kind "npz" the one array that holds all images.
    `ids` are the numbers in the file names (int) when these are numbered as FFHQ's are, else the names (str); sorted.
    `notes` are sentences for the report: what was passed over, and why.
    """

    path: Path
    kind: str  # "folder", "zip" or "npz"
    members: tuple[Member, ...]
    ids: tuple[int, ...] | tuple[str, ...]
    notes: tuple[str, ...]


def find_source(path: str | os.PathLike, image_size: int, numbered: bool = False) -> Source:
    """Lists the images of a folder (with its subfolders), a .zip or an .npz with one uint8 array (N, H, W, 3).

    Ids don't depend on the order of a directory, and numbers don't depend on the folders that they lie in.
    `image_size` (pixels) decides which copy is read when several of FFHQ's lie under one root: the smallest that need
    not be enlarged. `numbered=True` is for a set that must be numbered: unnumbered images are passed over with a note,
    and two images with one number are an error. They are passed over too where nearly all others are numbered: one
    stray preview.png must not turn the numbers of 70,000 images into names.
    Raises UserError when the path is missing, is none of the three, cannot be read or holds no image.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        kind, (members, notes) = "folder", _scan_folder(path)
    elif not path.exists():
        raise UserError(f"{path} does not exist. Give a folder, a .zip or an .npz of images.")
    elif path.suffix.lower() == ".npz":
        return _scan_npz(path)
    elif path.suffix.lower() == ".zip":
        kind, (members, notes) = "zip", _scan_zip(path)
    else:
        raise UserError(f"{path} is neither a folder nor a .zip nor an .npz. Give one of these.")

    members, layout_note = _choose_layout(members, image_size)
    notes += layout_note
    numbered_members, number_note = _keep_numbered(members)
    if numbered or NEARLY_ALL * len(members) <= len(numbered_members) < len(members):
        members, notes = numbered_members, notes + number_note
    if not members:
        raise UserError(f"{path} holds no image ({', '.join(IMAGE_EXTENSIONS)}). " + " ".join(notes))

    ids = _numbers([member.name for member in members])
    if ids is None and numbered:
        raise UserError(f"{path}: {_describe_clash(members)} Keep one copy of the set there, or point at one of them.")
    if ids is None:
        ids = [_normalised(member.name) for member in members]
    order = sorted(range(len(ids)), key=ids.__getitem__)
    return Source(path, kind, tuple(members[i] for i in order), tuple(ids[i] for i in order), tuple(notes))


def is_image_name(name: str) -> bool:
    """Whether a path inside a source is taken for an image: by its extension, unless it is hidden or macOS' shadow."""
    parts = PurePosixPath(_normalised(name)).parts
    stray = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return not stray and name.lower().endswith(IMAGE_EXTENSIONS)


# --- the three kinds ---------------------------------------------------------------------------------------------


def _scan_folder(path: Path) -> tuple[list[Member], list[str]]:
    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}). Check its permissions.")

    members, irregular, visited = [], [], set()
    # Links are followed, for a data folder is often a link to another disk; a link that leads back up is not.
    for folder, subfolders, files in os.walk(path, onerror=fail, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        subfolders.sort()
        for file in files:
            name = (Path(folder) / file).relative_to(path).as_posix()
            if not is_image_name(name):
                continue
            try:
                status = os.stat(os.path.join(folder, file))
            except OSError:  # a dangling link: listed here, so that reading it reports it by name
                members.append(Member(name, 0, 0))
                continue
            if stat.S_ISREG(status.st_mode):
                members.append(Member(name, status.st_size, status.st_mtime_ns))
            else:
                irregular.append(name)
    return members, _passed_over(irregular, "not a regular file")


def _scan_zip(path: Path) -> tuple[list[Member], list[str]]:
    members, refused = {}, []
    with open_archive(path) as archive:
        for info in archive.infolist():
            if info.orig_filename.lower().endswith(IMAGE_EXTENSIONS) and _is_hostile(info):
                refused.append(info.orig_filename)  # the name before it is cut at a zero byte
            elif is_image_name(info.filename):
                # A name that occurs twice means its last entry, as for every other zip tool.
                members[info.filename] = Member(info.filename, info.file_size, info.CRC)
            else:
                _check_name(archive, info, path)
    return list(members.values()), _passed_over(refused, "absolute path, '..', zero byte, link or encrypted")


def _scan_npz(path: Path) -> Source:
    found = []
    with open_archive(path) as archive:
        for info in archive.infolist():
            if not info.filename.endswith(".npy"):
                continue
            with open_member(archive, info.filename, path) as file:
                shape, fortran_order, dtype = read_npy_header(file, path)
                header = file.tell()
            if dtype == np.uint8 and len(shape) == 4 and shape[3] == 3 and min(shape) > 0 and not fortran_order:
                found.append((Member(info.filename, info.file_size, info.CRC), shape, header))
    if len(found) != 1:
        raise UserError(f"{path} holds {len(found)} uint8 arrays of shape (N, H, W, 3). It must hold exactly one.")
    member, shape, header = found[0]
    if shape[1] * shape[2] > MAX_PIXELS:
        raise UserError(f"{path} holds images of {shape[2]}x{shape[1]} pixels, more than {MAX_PIXELS:,}.")
    # Before anything is counted by it: the header can claim any number of images.
    if math.prod(shape) != member.size - header:
        raise UserError(f"{path} is cut short or damaged: its array is not as large as it says. Get or make it again.")
    return Source(path, "npz", (member,), tuple(range(shape[0])), ())


# --- names, numbers and layouts ----------------------------------------------------------------------------------


def _normalised(name: str) -> str:
    return name.replace("\\", "/")  # some Windows tools write zips with backslashes


def _is_hostile(info: zipfile.ZipInfo) -> bool:
    # Members are never extracted, so none of these could do harm; but no honest archive of images has them.
    name = _normalised(info.filename)
    is_link = stat.S_ISLNK(info.external_attr >> 16)
    is_encrypted = bool(info.flag_bits & 0x1)
    is_cut = "\0" in info.orig_filename
    return name.startswith("/") or name[1:2] == ":" or ".." in name.split("/") or is_link or is_encrypted or is_cut


def _check_name(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> None:
    # What is no image by its name is never read, which would compare the name with the other place that has it: a
    # damaged one would leave the set smaller, and nothing would say so.
    try:
        archive.open(info).close()
    except (zipfile.BadZipFile, struct.error, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {printable(error)}. Get or make it again.") from None
    except (NotImplementedError, RuntimeError):  # encrypted, or packed by some other method: no image of ours
        pass


def _numbers(names: list[str]) -> list[int] | None:
    """The number in each file name, when all are <one common prefix><number> and no number occurs twice."""
    matches = [re.fullmatch(r"([A-Za-z_-]*)(\d{1,18})", PurePosixPath(_normalised(name)).stem) for name in names]
    if not all(matches) or len({match[1] for match in matches}) != 1:
        return None
    numbers = [int(match[2]) for match in matches]
    return numbers if len(set(numbers)) == len(numbers) else None


def _keep_numbered(members: list[Member]) -> tuple[list[Member], list[str]]:
    is_numbered = {m.name: re.fullmatch(r"(img)?\d{1,18}", PurePosixPath(_normalised(m.name)).stem) for m in members}
    unnumbered = [name for name, match in is_numbered.items() if not match]
    return [m for m in members if is_numbered[m.name]], _passed_over(unnumbered, "no image number in the name")


def _describe_clash(members: list[Member]) -> str:
    first_with = {}
    for name in sorted(member.name for member in members):
        number = int(re.search(r"\d+$", PurePosixPath(_normalised(name)).stem)[0])
        if number in first_with:
            return f"{printable(first_with[number])} and {printable(name)} have the same number."
        first_with[number] = name
    return "the images are numbered in two different ways."


def _choose_layout(members: list[Member], image_size: int) -> tuple[list[Member], list[str]]:
    layouts = {member.name: FFHQ_LAYOUTS.keys() & set(_normalised(member.name).split("/")[:-1]) for member in members}
    found = sorted(set().union(*layouts.values()), key=FFHQ_LAYOUTS.get)
    if len(found) < 2:
        return members, []
    chosen = next((layout for layout in found if FFHQ_LAYOUTS[layout] >= image_size), found[-1])
    note = f"Found {' and '.join(found)}; used {chosen} only."
    return [member for member in members if chosen in layouts[member.name]], [note]


def _passed_over(names: list[str], reason: str) -> list[str]:
    if not names:
        return []
    return [f"Passed over {len(names)} ({reason}), the first is {printable(min(names))!r}."]
