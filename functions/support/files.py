"""Write files atomically, and write and read files of tensors with checksums.

Tensors are saved as .safetensors: a header in JSON, then the bytes of each tensor. Reading such a
file runs no code from it. The format has no checksums, so a flipped bit could silently become a
wrong weight. Therefore the metadata of our files has `contents`, a JSON text with plain values and
the checksum of each tensor, and `sha256`, the checksum of that text.
"""

import hashlib
import json
import os
import re
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
# The longest header that is read, in bytes. Ours have a few hundred thousand.
MAX_HEADER = 16 * 2**20
# Tensors are hashed and written in pieces of about this size, in bytes.
PIECE_SIZE = 2**20
# Weights may have these dtypes. The values are their names in safetensors.
TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
}
# Damaged or hostile files have raised these errors in the readers of safetensors, JSON, archives,
# arrays and images.
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


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that `path` always holds either all of the old or all of the new content.

    Raises OSError, which names `path`, for example when the disk is full.
    """
    # The content is written to a temporary file in the same folder and flushed to the disk. Then
    # the file is renamed.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # Users do not know about the temporary file, so the error names the final one.
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


def write_text(path: Path, text: str) -> None:
    """Write a text to a file with `write_atomically`."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_tensors(
    path: Path, tensors: dict[str, Tensor], contents: dict | None, file_format: str = FORMAT
) -> None:
    """Write tensors of any memory layout and, in our own files, `contents` of plain values.

    Raises OSError, for example when the disk is full. Then the old file is unchanged.
    """
    # Each tensor is read once, and hashed while it is written. So the header is written twice:
    # first with placeholders as long as the checksums, and at the end with the checksums.
    checksums = dict.fromkeys(tensors, sha256(""))
    # The tensors with the largest elements come first, so that every tensor is aligned.
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
        # Spaces pad the header to a multiple of 8 bytes, so that the first tensor is aligned.
        header += b" " * (-len(header) % 8)
        file.write(len(header).to_bytes(8, "little") + header)

    def write(file):
        write_header(file)
        # The save_file of safetensors needs contiguous copies of all tensors together, and does
        # not flush the file to the disk. This loop copies one piece of a tensor at a time.
        for name, tensor in tensors.items():
            checksums[name] = checksum(tensor, file.write)
        file.seek(0)
        write_header(file)

    write_atomically(path, write)


class TensorFile:
    """A file that `write_tensors` wrote. Opening it reads and checks `contents`, but no tensor.

    Raises CheckpointError when the file is missing, truncated, damaged or of another format.
    """

    def __init__(self, path: Path):
        self.path = path
        with open_safetensors(path) as file:
            metadata = file.metadata()
            text = metadata["contents"]
            if metadata["format"] != FORMAT or metadata["sha256"] != sha256(text):
                raise ValueError("it has another format or a wrong checksum")
            self.contents = json.loads(text)
            self.checksums = self.contents.pop("checksums")
            if self.checksums.keys() != set(file.keys()):
                raise ValueError("its tensors are not the ones listed in its contents")

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Read the tensors whose names begin with `prefix`, to the CPU, as `read_tensors` does."""
        return read_tensors(self.path, prefix, self.checksums)


def read_tensors(
    path: Path, prefix: str = "", checksums: dict[str, str] | None = None
) -> dict[str, Tensor]:
    """Read the tensors whose names begin with `prefix` from any safetensors file.

    The names are returned without the prefix. Only our own files have `checksums`. Raises
    CheckpointError as `TensorFile` does, and for a tensor that has a wrong checksum, a dtype that
    is not in `TYPES`, or numbers that are not finite.
    """
    with open_safetensors(path) as file:
        names = checksums or sorted(file.keys())
        tensors = {name: file.get_tensor(name) for name in names if name.startswith(prefix)}
    for name, tensor in tensors.items():
        if checksums and checksum(tensor) != checksums[name]:
            raise CheckpointError(f"{path}: damaged: {short(name)} does not match its checksum")
        if tensor.dtype not in TYPES:
            raise CheckpointError(f"{path}: {short(name)} is {tensor.dtype}, but weights cannot be")
        # An empty tensor has no minimum and maximum. If any number in another tensor is not finite,
        # its minimum or maximum is not finite either.
        if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise CheckpointError(f"{path}: {short(name)} has numbers that are not finite")
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def read_json(path: Path) -> dict:
    """Read a JSON file that contains one object.

    Raises CheckpointError when the file is missing or damaged, contains another value, or has the
    same name twice.
    """
    check_file(path)
    try:
        if path.stat().st_size > MAX_HEADER:
            raise ValueError("the file is too large")
        fields = json.loads(path.read_bytes(), object_pairs_hook=unique_fields)
        if not isinstance(fields, dict):
            raise ValueError("it is not an object in braces")
        return fields
    except READ_ERRORS as error:
        raise CheckpointError(f"{path}: cannot be read: {short(error)}") from error


def unique_fields(pairs: list[tuple[str, object]]) -> dict:
    """Return a dict of the pairs. Raises ValueError when two pairs have the same name."""
    fields = dict(pairs)
    # By default json uses the last value of a repeated name, without an error.
    if len(fields) < len(pairs):
        raise ValueError("a name appears twice")
    return fields


def check_file(path: Path) -> None:
    """Raise CheckpointError unless this is a regular file."""
    # Opening a pipe would block until a writer opens it.
    if not path.is_file():
        fault = "not a regular file" if path.exists() else "there is no such file"
        raise CheckpointError(f"{path}: {fault}")


@contextmanager
def open_safetensors(path: Path) -> Iterator[safe_open]:
    """Open a safetensors file.

    Raises CheckpointError when the file is missing, truncated or damaged, and when the `with` block
    raises one of `READ_ERRORS`.
    """
    check_file(path)
    try:
        with open(path, "rb") as file:
            start = file.read(8)
        # The first 8 bytes are the length of the header, which follows. It must fit into the file
        # and must not exceed MAX_HEADER.
        if int.from_bytes(start, "little") > min(MAX_HEADER, path.stat().st_size - 8):
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
    """Return the SHA-256 of a tensor's dtype, shape and bytes, in hexadecimal.

    With `write`, each piece of the bytes is also written.
    """
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    for piece in byte_pieces(tensor):
        digest.update(piece)
        if write:
            write(piece)
    return digest.hexdigest()


def byte_pieces(tensor: Tensor) -> Iterator[np.ndarray]:
    """Yield a tensor's bytes piece by piece, as if the tensor were contiguous."""
    rows = torch.atleast_1d(tensor.detach())
    # A piece of about a megabyte stays in the cache while it is reordered, hashed and written.
    # Copying the whole tensor takes three times as long, mostly because the system has to map new
    # memory for the copy.
    length = max(1, len(rows) * PIECE_SIZE // max(1, rows.nbytes))
    for piece in rows.split(length):
        # A GPU reorders faster than a CPU, so the piece is made contiguous before it is copied.
        yield piece.contiguous().cpu().reshape(-1).view(torch.uint8).numpy()


def sha256(text: str) -> str:
    # A text from a hostile file may contain surrogates, which UTF-8 cannot encode.
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def short(value) -> str:
    """Prepare a text from a file for a message: make it one line, and cut it at 200 characters.

    Characters that control a terminal are escaped.
    """
    text = str(value)
    start = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:200])
    return start if len(text) <= 200 else f"{start}..."


def file_name(text: str) -> str:
    """Prepare a text for a file name: cut it at 200 characters, as `short` does.

    Characters that Windows forbids in names become underscores, so that results made on one system
    can be copied to another one. The caller adds letters before and after the text, because Windows
    also forbids names such as "con", and a dot or a space at the end.
    """
    return re.sub(r'[<>:"/\\|?*]', "_", short(text))
