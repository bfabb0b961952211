"""Write files atomically, and read those of others with errors that name them."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from functions.support.errors import WRITE_ERRORS, CheckpointError, printable, warn


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the name of a temporary file, which replaces `path` at the end of the context.

    So `path` always has either all of the old or all of the new content. An OSError, such as for a
    full disk, names `path`.
    """
    # The temporary file is in the same folder, and flushed to the disk before it is renamed.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # Users do not know about the temporary file, so the error names the final one.
        if error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)

    # The new name is on the disk only after the folder is flushed, too. Only POSIX systems can open
    # a folder.
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def holding(path: Path, advice: str) -> Iterator[None]:
    """Hold the lock `path` within the context.

    A disk without locks is a warning, which ends with the advice. Raises filelock's Timeout when
    another process holds it, and OSError when it cannot be written.
    """
    # The system releases the lock when the process ends, even when it is killed.
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise
    except (NotImplementedError, OSError) as error:
        if getattr(error, "errno", None) in WRITE_ERRORS:
            raise
        warn(f"warning: {path.parent} is on a disk without locks; {advice}")
    try:
        yield
    finally:
        lock.release()


def write_text(path: Path, text: str) -> None:
    """Write a text to a file, which replaces `path` as a whole."""
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode(errors="backslashreplace"))


def read_json(path: Path) -> dict:
    """Read a JSON file that contains one object. Raises CheckpointError for any other."""
    check_file(path)
    return parse_json(path, path.read_bytes())


def parse_json(path: Path, text: str | bytes) -> dict:
    """Parse a text of the file `path`, one JSON object. Raises CheckpointError for any other."""
    try:
        values = json.loads(text)
    # The second one is for brackets in brackets, a thousand deep.
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {printable(error)}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: cannot be read: it is no JSON object")
    return values


def check_file(path: Path) -> None:
    """Raise CheckpointError unless this is a file."""
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")


def sha256(text: str) -> str:
    """Return the SHA-256 of a text, in hexadecimal."""
    # Names of files may contain bytes that are not UTF-8, which Python reads as surrogates.
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
