"""What the packed file needs of the file system: locks, whole writes, and room."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from functions.support.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has no flock; two runs that prepare the same data at the same moment aren't guarded there
    fcntl = None


def is_writable(folder: Path) -> bool:
    """Whether files can be made in a folder (which is created if need be): tried, since permissions don't tell all."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".packed.probe") as file:
            if fcntl is not None:  # some network disks can't lock, and a lock is needed
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except OSError as error:
        # A full disk is not a read-only one: going elsewhere in silence would hide it.
        return error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def file_lock(path: Path, quiet: bool = False) -> Iterator[None]:
    """Holds an exclusive lock on a file, waiting for it if another process has it.

    The system drops the lock when its holder ends, however it ends; so the file stays and never has to be cleaned up.
    """
    with open(path, "ab") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not quiet:
                    print(f"Another process is preparing {path.with_suffix('')}; waiting for it.", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_atomically(path: Path, text: str) -> None:
    """Writes a small text file under a temporary name, flushes it to the disk and renames it."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def flush_folder(folder: Path) -> None:
    """Makes the renames and removals in a folder outlast a power cut, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_disk_space(folder: Path, bytes_needed: int) -> None:
    """Raises UserError when a folder's disk has less room than bytes_needed."""
    free = shutil.disk_usage(folder).free
    if free < bytes_needed:
        raise UserError(
            f"{folder} has {format_bytes(free)} free, but the packed images take "
            f"{format_bytes(bytes_needed)}. Make room there and start again."
        )


def format_bytes(count: int) -> str:
    """3440640000 -> '3.44 GB'; below a gigabyte in MB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
