"""Is a checkpoint's file what it seems to be? Checksums before it is read, and its values before they are used."""

import pickle
import pickletools
import re
import struct
import zipfile
import zlib
from pathlib import Path

import torch
from torch import Tensor

from functions.support.errors import CheckpointError

# What PyTorch's reader was seen to raise on files that are not whole or not checkpoints
READ_ERRORS = (
    OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError,
    pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, struct.error,
)  # fmt: skip

# All that a pickle of tensors in plain containers asks for by name. `weights_only` allows more, such as bytearrays of
# any size and tensors without numbers.
GLOBALS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_tensor_v2|"
    r"torch (Float|Double|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage"
)
MOST_VALUES, DEEPEST_NAME = 1_000_000, 1_000  # a checkpoint has some thousands; a few references can repeat without end


def check_whole(path: Path) -> None:
    """Compare a checkpoint's bytes with the checksums in it: PyTorch's file is a zip archive with a CRC-32 a tensor.

    PyTorch itself does not compare them when it reads: a flipped bit would become a wrong weight.

    Raises:
        CheckpointError: the file is missing, empty, truncated, damaged or no such archive, would unpack to more than
            it is, or asks for what no checkpoint holds.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: the file is empty")
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            check_members(archive, path)
            damaged = archive.testzip()
    except CheckpointError:
        raise
    except READ_ERRORS as error:
        raise CheckpointError(f"{path}: the file is truncated, damaged or not a checkpoint") from error
    if damaged:
        raise CheckpointError(f"{path}: the file is damaged: {short(damaged)} does not match its checksum")


def check_members(archive: zipfile.ZipFile, path: Path) -> None:
    """Refuse archives that this reader and PyTorch's could take for different things, or that would not stay small."""
    archive.fp.seek(0)
    if archive.fp.read(4) != b"PK\x03\x04":  # PyTorch would take it for a bare pickle, which has no checksums
        raise CheckpointError(f"{path}: the file does not begin as a checkpoint does")
    members = archive.infolist()
    if len({member.filename.lower() for member in members}) < len(members):  # PyTorch does not tell cases apart
        raise CheckpointError(f"{path}: the file has two members of one name, as no checkpoint does")
    stored = all(m.compress_type == zipfile.ZIP_STORED and m.file_size == m.compress_size for m in members)
    if not stored or sum(member.file_size for member in members) > path.stat().st_size:
        raise CheckpointError(f"{path}: the file would unpack to more than it is, as no checkpoint does")
    for member in members:
        if member.filename.lower().endswith("data.pkl"):
            for opcode, name, _ in pickletools.genops(archive.read(member)):
                if opcode.name == "GLOBAL" and not GLOBALS.fullmatch(name):
                    raise CheckpointError(f"{path}: not a checkpoint: it asks for {short(name)!r}, which none holds")


def check_values(contents: dict, path: Path) -> None:
    """`CheckpointError` unless there are only plain values and finite tensors, in containers by name, not too many.

    Config and run hold no tensors, and only the optimiser's state goes by numbers.
    """
    waiting, seen = [("", contents)], 0
    while waiting:
        where, value = waiting.pop()
        seen += 1
        if seen + len(waiting) > MOST_VALUES or len(where) > DEEPEST_NAME:
            raise CheckpointError(f"{path}: {short(where)} holds more, or deeper, than a checkpoint does")
        by = (str, int) if where.startswith("optimizer") else str
        if isinstance(value, dict) and all(isinstance(key, by) for key in value):
            waiting += [(f"{where}.{short(key)}".removeprefix("."), item) for key, item in value.items()]
        elif isinstance(value, (list, tuple)):
            waiting += [(f"{where}[{i}]", item) for i, item in enumerate(value)]
        elif isinstance(value, Tensor) and not where.startswith(("config", "run")):
            whole = value.numel() * value.element_size() <= value.untyped_storage().nbytes()  # it repeats no numbers
            if not whole or value.is_conj() or value.is_neg() or value.requires_grad:
                raise CheckpointError(f"{path}: {short(where)} is not a plain tensor")
            if value.is_floating_point() and value.numel() and not torch.stack(value.aminmax()).isfinite().all():
                raise CheckpointError(f"{path}: {short(where)} holds numbers that are not finite")
        elif isinstance(value, int) and abs(value) >= 2**63:
            raise CheckpointError(f"{path}: {short(where)} is an integer of more than 64 bits")
        elif not isinstance(value, (str, int, float, type(None))):
            raise CheckpointError(f"{path}: {short(where)} is a {type(value).__name__} as no checkpoint has there")


def short(value: object) -> str:
    """Text out of a file, for a message: one line, printable, not too long."""
    text = "".join(c if c.isprintable() else " " for c in str(value))
    return text if len(text) <= 200 else f"{text[:200]}..."
