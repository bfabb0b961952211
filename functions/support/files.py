"""Files that are whole or not there: atomic writes, and tensors with a checksum each, read without running any code.

A file of tensors is a .safetensors: a header in JSON, then the numbers of each tensor. The format has no checksums, and
a flipped bit would become a wrong weight. So our metadata has `contents`, a JSON text of plain values and the checksum
of every tensor, and `sha256`, the checksum of that text.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from functions.support.errors import CheckpointError

FORMAT = "ddpm-faces checkpoint 2"
LONGEST_HEADER = 16 * 2**20  # bytes; ours take some hundred thousand
TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
}
# What damaged or hostile files were seen to raise on their way through the readers of safetensors and JSON
READ_ERRORS = (
    SafetensorError,
    OSError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
)


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that `path` holds either what it held before or all of the new content, whatever happens.

    A temporary file beside it is filled, flushed to the disk and renamed; then the folder's entry is flushed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # not the temporary file's, which nobody knows
        raise
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Write a text as `write_whole` does."""
    write_whole(path, lambda file: file.write(text.encode()))


def write_tensors(path: Path, tensors: dict[str, Tensor], contents: dict) -> None:
    """Write a file of ours: tensors, and `contents` of plain values. Raises OSError as `write_safetensors` does."""
    text = json.dumps(
        {**contents, "checksums": {name: checksum(tensor) for name, tensor in tensors.items()}}
    )
    write_safetensors(path, tensors, {"format": FORMAT, "contents": text, "sha256": sha256(text)})


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors of any layout, with one of them at a time copied where it must be.

    The save_file of safetensors would want all of them contiguous at once, and flushes nothing to the disk.
    Raises OSError, with `path` as it was, when the disk is full or the like.
    """
    # So that each is aligned
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    entries, end = {"__metadata__": metadata}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        entries[name] = {
            "dtype": TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)

    def write(file: BinaryIO) -> None:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors.values():
            file.write(numbers(tensor))

    write_whole(path, write)


class TensorFile:
    """A file that `write_tensors` wrote, opened: `contents` are read and right, tensors are mapped when asked for.

    Raises CheckpointError when the file is missing, truncated, damaged, or not one of ours.
    """

    def __init__(self, path: Path):
        self.path = path
        check_header(path)
        try:
            with safe_open(path, framework="pt") as file:
                metadata, names = file.metadata() or {}, set(file.keys())
        except READ_ERRORS as error:
            raise CheckpointError(
                f"{path}: the file is truncated, damaged or not a checkpoint"
            ) from error
        if metadata.get("format") != FORMAT:
            raise CheckpointError(
                f"{path}: a safetensors file, but not a checkpoint of this version of the project"
            )
        text = metadata.get("contents", "")
        if metadata.get("sha256") != sha256(text):
            raise CheckpointError(
                f"{path}: the file is damaged: its contents do not match their checksum"
            )
        try:
            self.contents = json.loads(text)
            self.checksums = self.contents.pop("checksums")
            named = self.checksums.keys() == names
        except READ_ERRORS as error:
            raise CheckpointError(f"{path}: its contents do not read: {short(error)}") from error
        if not named:
            raise CheckpointError(f"{path}: its tensors are not those that its contents name")

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix`, without it, on the CPU; compared with their checksums.

        Raises CheckpointError when one is damaged, or holds numbers that are not finite.
        """
        found = read_tensors(self.path, prefix, self.checksums)
        return {name.removeprefix(prefix): tensor for name, tensor in found.items()}


def read_tensors(
    path: Path, prefix: str = "", checksums: dict[str, str] | None = None
) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, of a safetensors file that anyone wrote; ours have `checksums`.

    Raises CheckpointError as `TensorFile` does, and for numbers that are not finite or of a type that no weights have.
    """
    check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            names = checksums or sorted(file.keys())
            found = {name: file.get_tensor(name) for name in names if name.startswith(prefix)}
    except READ_ERRORS as error:
        raise CheckpointError(
            f"{path}: the file is truncated, damaged or no safetensors"
        ) from error
    for name, tensor in found.items():
        if checksums and checksum(tensor) != checksums[name]:
            raise CheckpointError(f"{path}: damaged: {short(name)} does not match its checksum")
        if tensor.dtype not in TYPES:
            raise CheckpointError(f"{path}: {short(name)} is {tensor.dtype}, which no weights are")
        if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise CheckpointError(f"{path}: {short(name)} holds numbers that are not finite")
    return found


def read_json(path: Path) -> dict:
    """A JSON file of fields. Raises CheckpointError when it is missing, damaged or another, or has a name twice."""
    try:
        if path.exists() and (not path.is_file() or path.stat().st_size > LONGEST_HEADER):
            raise ValueError("no file, or too large a one")
        fields = json.loads(path.read_bytes(), object_pairs_hook=unique)
        if not isinstance(fields, dict):
            raise ValueError("no fields in braces")
        return fields
    except READ_ERRORS as error:
        what = (
            "there is no such file"
            if isinstance(error, FileNotFoundError)
            else f"cannot be read: {short(error)}"
        )
        raise CheckpointError(f"{path}: {what}") from error


def unique(pairs: list[tuple[str, object]]) -> dict:
    """A dict, but ValueError where json would take the last of two values of a name."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a name is there twice")
    return fields


def check_header(path: Path) -> None:
    """Raise CheckpointError unless it is a file whose header is no longer than the file, and than any of ours."""
    if not path.is_file():
        raise CheckpointError(
            f"{path}: {'not a regular file' if path.exists() else 'there is no such file'}"
        )
    try:
        with open(path, "rb") as file:
            start, size = file.read(8), path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    if int.from_bytes(start, "little") > min(LONGEST_HEADER, size - 8):
        what = (
            "truncated, damaged or not a checkpoint of this version (see CHANGELOG.md)"
            if size
            else "empty"
        )
        raise CheckpointError(f"{path}: the file is {what}")


def checksum(tensor: Tensor) -> str:
    """SHA-256 over a tensor's type, shape and numbers, in hexadecimal."""
    total = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    total.update(numbers(tensor))
    return total.hexdigest()


def numbers(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor's numbers, in the order of its shape."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def short(value: object) -> str:
    """Text out of a file, for a message: one line, not too long, without what a terminal would obey."""
    text = str(value)
    start = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:200])
    return start if len(text) <= 200 else f"{start}..."
