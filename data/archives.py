"""Opening zips and npz files that may be damaged or made to do harm, and telling of it."""

import errno
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from functions.support.errors import UserError

# What Python's zip reader and NumPy's header reader raise on broken bytes.
ARCHIVE_ERRORS = (
    OSError, EOFError, ValueError, TypeError, LookupError, RuntimeError, NotImplementedError, SyntaxError,
    OverflowError, struct.error, zlib.error, zipfile.BadZipFile, tokenize.TokenError,
)  # fmt: skip
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # Python's readers of others unpack all at once, however much


def open_archive(path: Path) -> zipfile.ZipFile:
    """Opens a zip or npz for reading; UserError when it is not one, cannot be read, or lists less than it says."""
    try:
        archive = zipfile.ZipFile(path)
        # A damaged list of members can end early, or hide some inside another's comment.
        if promised_members(archive) in (0xFFFF, len(archive.infolist()) % 2**16):  # the former: too many to say
            return archive
        archive.close()
    except OSError as error:
        if error.strerror and error.errno != errno.EINVAL:  # that is a seek to a place which the archive's end makes up
            raise UserError(f"{path} cannot be read ({error.strerror}). Check its permissions.") from None
    except ARCHIVE_ERRORS:
        pass
    raise UserError(f"{path} is not a complete zip archive. Was its download cut short? Get it again.")


def promised_members(archive: zipfile.ZipFile) -> int:
    """The number of members in the record at an archive's end, which Python's reader does not look at."""
    archive.fp.seek(0, 2)
    archive.fp.seek(max(0, archive.fp.tell() - 22 - 2**16))  # the record, and the longest comment after it
    tail = archive.fp.read()
    return struct.unpack_from("<H", tail, tail.rfind(b"PK\x05\x06") + 10)[0]


def open_member(archive: zipfile.ZipFile, name: str, path: Path) -> IO[bytes]:
    """Opens a member for reading; UserError when that cannot be done."""
    if archive.getinfo(name).compress_type not in METHODS:
        raise UserError(f"{path}: {printable(name)} is packed by another method than deflate. Make the archive anew.")
    try:
        return archive.open(name)
    except ARCHIVE_ERRORS as error:
        raise UserError(f"{path} is damaged ({printable(error)}). Get or make it again.") from None


def read_npy_header(file, path: Path) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Reads the header of an .npy stream -> shape, whether in Fortran order, dtype; no pickle is ever loaded."""
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            return np.lib.format.read_array_header_1_0(file)
        return np.lib.format.read_array_header_2_0(file)
    except ARCHIVE_ERRORS as error:
        raise UserError(f"{path} holds a broken array ({printable(error)}). Get or make it again.") from None


def printable(text: object) -> str:
    """Text out of a file, for messages and reports: one line, not too long, without what a terminal would obey."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))
    return line if len(line) <= 200 else f"{line[:200]}..."
