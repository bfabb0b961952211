"""Files that are whole or not there: atomic writes, and tensors with a checksum each.

A file of tensors is a .safetensors: a header in JSON, then the numbers of each tensor. No code of
a file is run when it is read. The format has no checksums, and a flipped bit would become a wrong
weight. So our metadata has `contents`, a JSON text of plain values and the checksum of every
tensor, and `sha256`, the checksum of that text.
"""

import hashlib
import json
import os
import struct
import tarfile
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from functions.support.errors import CheckpointError

FORMAT = "ddpm-faces checkpoint 2"
# This is in bytes. Our headers take some hundred thousand.
LONGEST_HEADER = 16 * 2**20
# This is in bytes, too: as much of a tensor is hashed and written at once.
PIECE = 2**20
# The types that weights may have, and what safetensors calls them.
TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
}
# Damaged or hostile files were seen to raise these on their way through the readers of safetensors,
# JSON, archives, arrays and images.
READ_ERRORS = (
    SafetensorError,
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    SyntaxError,
    OverflowError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
    tarfile.TarError,
    tokenize.TokenError,
)


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that `path` always holds what it held before, or all of the new content.

    Raises OSError, with `path` in it, when the disk is full or the like.
    """
    # A temporary file beside it is filled and flushed to the disk, and then takes its name.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # Nobody knows the temporary file, so the error names the one that was to be written.
        error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)

    # The new name is on the disk when its folder is. Only POSIX systems can open a folder.
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Write a text as `write_whole` does."""
    write_whole(path, lambda file: file.write(text.encode()))


def write_tensors(
    path: Path, tensors: dict[str, Tensor], contents: dict | None, file_format: str = FORMAT
) -> None:
    """Write tensors of any layout; a file of ours has `contents` of plain values as well.

    Raises OSError, with `path` as it was, when the disk is full or the like.
    """
    # Each tensor is read once, and hashed while it is written. So the header is first written with
    # checksums that take as much room as the right ones, and is written again at the end.
    checksums = dict.fromkeys(tensors, sha256(""))
    # The tensors with the widest numbers come first, so that each is aligned.
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    entries = {}
    end = 0
    for name, tensor in tensors.items():
        start = end
        end += tensor.nbytes
        entries[name] = {
            "dtype": TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }

    def write_header(file):
        fields = {"format": file_format}
        if contents is not None:
            text = json.dumps({**contents, "checksums": checksums})
            fields |= {"contents": text, "sha256": sha256(text)}
        header = json.dumps({"__metadata__": fields, **entries}).encode()
        # Spaces fill the header up to a multiple of 8 bytes, so that the numbers begin aligned.
        header += b" " * (-len(header) % 8)
        file.write(len(header).to_bytes(8, "little") + header)

    def write(file):
        write_header(file)
        # The save_file of safetensors wants all tensors contiguous at once, and flushes nothing to
        # the disk. Here one piece of a tensor at a time is copied, where it must be.
        for name, tensor in tensors.items():
            checksums[name] = checksum(tensor, file.write)
        file.seek(0)
        write_header(file)

    write_whole(path, write)


class TensorFile:
    """Open a file that `write_tensors` wrote: read and check `contents`, but no tensor yet.

    Raises CheckpointError when the file is missing, truncated, damaged, or not one of ours.
    """

    def __init__(self, path: Path):
        self.path = path
        with opened(path) as file:
            metadata = file.metadata()
            text = metadata["contents"]
            if metadata["format"] != FORMAT or metadata["sha256"] != sha256(text):
                raise ValueError("another format, or a wrong checksum")
            self.contents = json.loads(text)
            self.checksums = self.contents.pop("checksums")
            if self.checksums.keys() != set(file.keys()):
                raise ValueError("other tensors than the contents name")

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Read the tensors whose names begin with `prefix`, to the CPU, and name them without it.

        Raises CheckpointError when one does not match its checksum, or holds numbers that are not
        finite.
        """
        return read_tensors(self.path, prefix, self.checksums)


def read_tensors(
    path: Path, prefix: str = "", checksums: dict[str, str] | None = None
) -> dict[str, Tensor]:
    """Read the tensors whose names begin with `prefix` from a safetensors file that anyone wrote.

    They are named without it. Files of ours have `checksums`. Raises CheckpointError as
    `TensorFile` does, and for numbers that are not finite or of a type that no weights have.
    """
    with opened(path) as file:
        names = checksums or sorted(file.keys())
        tensors = {name: file.get_tensor(name) for name in names if name.startswith(prefix)}
    for name, tensor in tensors.items():
        if checksums and checksum(tensor) != checksums[name]:
            raise CheckpointError(f"{path}: damaged: {short(name)} does not match its checksum")
        if tensor.dtype not in TYPES:
            raise CheckpointError(f"{path}: {short(name)} is {tensor.dtype}, which no weights are")
        # An empty tensor has no extremes. Those of others are not finite when any number is not.
        if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise CheckpointError(f"{path}: {short(name)} holds numbers that are not finite")
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def read_json(path: Path) -> dict:
    """Read a JSON file of fields.

    Raises CheckpointError when it is missing, damaged or holds something else, or has a name twice.
    """
    check_file(path)
    try:
        if path.stat().st_size > LONGEST_HEADER:
            raise ValueError("too large a file")
        fields = json.loads(path.read_bytes(), object_pairs_hook=unique)
        if not isinstance(fields, dict):
            raise ValueError("no fields in braces")
        return fields
    except READ_ERRORS as error:
        raise CheckpointError(f"{path}: cannot be read: {short(error)}") from error


def unique(pairs: list[tuple[str, object]]) -> dict:
    """Return a dict of the pairs. Raises ValueError for a name that is there twice."""
    fields = dict(pairs)
    # Without this, json would silently take the last of two values of a name.
    if len(fields) < len(pairs):
        raise ValueError("a name is there twice")
    return fields


def check_file(path: Path) -> None:
    """Raise CheckpointError unless this is a regular file."""
    # To open a pipe would wait for a writer.
    if not path.is_file():
        fault = "not a regular file" if path.exists() else "there is no such file"
        raise CheckpointError(f"{path}: {fault}")


@contextmanager
def opened(path: Path) -> Iterator[safe_open]:
    """Open a safetensors file.

    Raises CheckpointError when it is missing, truncated or damaged, and when what is done with it
    raises one of `READ_ERRORS`.
    """
    check_file(path)
    try:
        with open(path, "rb") as file:
            start = file.read(8)
        # The first 8 bytes are the length of the header, which follows them. It must be no longer
        # than the file, and than any of ours.
        if int.from_bytes(start, "little") > min(LONGEST_HEADER, path.stat().st_size - 8):
            raise ValueError("the header is too long")
        with safe_open(path, framework="pt") as file:
            yield file
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except READ_ERRORS as error:
        raise CheckpointError(
            f"{path}: the file is truncated, damaged or not a checkpoint of this version "
            "(see CHANGELOG.md)"
        ) from error


def checksum(tensor: Tensor, write: Callable[[np.ndarray], object] | None = None) -> str:
    """Return a SHA-256 over a tensor's type, shape and numbers, in hexadecimal.

    `write`, if any, is called with each piece of the numbers' bytes on the way.
    """
    total = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    for piece in numbers(tensor):
        total.update(piece)
        if write:
            write(piece)
    return total.hexdigest()


def numbers(tensor: Tensor) -> Iterator[np.ndarray]:
    """Yield the bytes of a tensor's numbers, in the order of its shape, piece by piece."""
    rows = torch.atleast_1d(tensor.detach())
    # A piece of about a megabyte stays in the cache while it is reordered, hashed and written. A
    # copy of the whole tensor takes three times as long, most of it for memory new to the process.
    length = max(1, len(rows) * PIECE // max(1, rows.nbytes))
    for piece in rows.split(length):
        # A GPU reorders at no cost, so the copy to the CPU comes last.
        yield piece.contiguous().cpu().reshape(-1).view(torch.uint8).numpy()


def sha256(text: str) -> str:
    # A text out of a hostile file may have surrogates, which utf-8 would refuse.
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def short(value) -> str:
    """Return a text out of a file for a message: in one line, and not too long.

    What a terminal would obey is escaped.
    """
    text = str(value)
    start = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:200])
    return start if len(text) <= 200 else f"{start}..."
