"""Define the errors that users can fix, and what their messages need.

Scripts print such an error in one line, and exit with status 2.
"""

import errno
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# The errors of a disk that is full or broken, and of a place that may not be written to.
WRITE_ERRORS = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.ENOSPC,
    errno.EPERM,
    errno.EROFS,
}


class UserError(Exception):
    """An error that users can fix. Scripts print its one sentence without a traceback."""


class CheckpointError(UserError):
    """The file that the message names cannot be used. Callers may use the checkpoint before it."""


@contextmanager
def door(what: str) -> Iterator[None]:
    """Import from extras/ in the context. Raises UserError, with what needs it, if it is gone."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] != "extras":
            raise
        raise UserError(
            f"{what} needs {error.name.replace('.', '/')} of this project, which is not here"
        ) from error


def warn(text: str) -> None:
    """Print a warning to stderr."""
    print(text, file=sys.stderr)


def quoted(path: Path) -> str:
    """Return a path as a command in a message needs it: with quotes if it has spaces."""
    # Slashes need no quotes, on Windows either.
    return shlex.quote(path.as_posix())


def printable(value) -> str:
    """Return 200 characters of a text from a file, for a message, without a terminal's controls."""
    text = str(value)
    start = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:200])
    return start if len(text) <= 200 else f"{start}..."
