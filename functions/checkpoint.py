"""Checkpoints: tensors and plain containers in one file, written whole or not at all, read without running any code.

A checkpoint is a dict of
    format      FORMAT, which tells ours from other .pt files
    config      {"diffusion": {...}, "model": {...}}: all that rebuilds the model
    run         {"experiment", "step", "total_steps", ...}: where the run stood, as plain values
    model       the raw weights' state dict
    ema         the averaged weights' state dict, or None
    optimizer   Adam's state dict
    scaler      the gradient scaler's state dict; empty without float16
"""

import json
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

FORMAT = "ddpm-faces checkpoint 1"
PARTS = {"config": dict, "run": dict, "model": dict, "ema": (dict, type(None)), "optimizer": dict, "scaler": dict}

# What PyTorch's reader was seen to raise on files that are not whole or not checkpoints
READ_ERRORS = (
    OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError,
    pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, struct.error,
)  # fmt: skip


class CheckpointError(RuntimeError):
    """A checkpoint or run that cannot be used; the message names the file and what is wrong with it."""


def write_whole(path: Path, write: Callable[[BinaryIO], None]) -> None:
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
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save_checkpoint(path: Path, **parts: object) -> None:
    """Write a checkpoint; `parts` are those of this module's docstring but `format`."""
    assert parts.keys() == PARTS.keys(), f"a checkpoint has exactly the parts {list(PARTS)}"
    write_whole(path, lambda file: torch.save({"format": FORMAT, **parts}, file))


def check_whole(path: Path) -> None:
    """Compare a checkpoint's bytes with the checksums in it: PyTorch's file is a zip archive with a CRC-32 a tensor.

    PyTorch itself does not compare them when it reads: a flipped bit would become a wrong weight.

    Raises:
        CheckpointError: the file is missing, empty, truncated, damaged or no such archive.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: the file is empty")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except READ_ERRORS as error:
        raise CheckpointError(f"{path}: the file is truncated, damaged or not a checkpoint") from error
    if damaged:
        raise CheckpointError(f"{path}: the file is damaged: {damaged} does not match its checksum")


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict:
    """Read a checkpoint, its checksums compared, with `weights_only=True`: a file can hold data, never code that runs.

    Raises:
        CheckpointError: it is missing, truncated, damaged, or not one of ours.
    """
    check_whole(path)
    try:
        contents = torch.load(path, map_location=device, weights_only=True)
    except READ_ERRORS as error:
        raise CheckpointError(f"{path}: the file is damaged or not a checkpoint") from error
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise CheckpointError(f"{path}: a PyTorch file, but not a checkpoint of this project")
    for name, kind in PARTS.items():
        if not isinstance(contents.get(name, 0), kind):
            raise CheckpointError(f"{path}: the checkpoint's part {name!r} is missing or malformed")
    check_run(contents["run"], path)
    return contents


def check_run(run: dict, path: Path) -> None:
    """`CheckpointError` unless the part `run` says which run this is and where it stood."""
    for name, kind in {"experiment": str, "step": int, "total_steps": int}.items():
        if not isinstance(run.get(name), kind):
            raise CheckpointError(f"{path}: the checkpoint's part 'run' has no proper {name!r}")


def load_weights(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict, dict]:
    """What sampling needs, of a checkpoint or an exported .safetensors file.

    Returns:
        The weights (EMA's if the run has them), the config (as in a checkpoint), and the part `run` with
        `weights` added: "EMA" or "raw".

    Raises:
        CheckpointError: as `load_checkpoint`.
    """
    if path.suffix == ".safetensors":
        return load_exported(path, device)
    contents = load_checkpoint(path, device)
    which = "EMA" if contents["ema"] is not None else "raw"
    return contents["ema" if which == "EMA" else "model"], contents["config"], {**contents["run"], "weights": which}


def export_weights(path: Path, weights: dict[str, Tensor], config: dict, run: dict) -> None:
    """Write what `load_weights` returned as safetensors, with config and run as JSON in its header."""
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: an exported file's name must end in .safetensors, by which it is known")
    metadata = {"format": FORMAT, "config": json.dumps(config), "run": json.dumps(run)}
    weights = {name: tensor.contiguous().cpu() for name, tensor in weights.items()}
    write_whole(path, lambda file: file.write(save(weights, metadata)))


def load_exported(path: Path, device: torch.device | str) -> tuple[dict[str, Tensor], dict, dict]:
    """The inverse of `export_weights`."""
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: the file is empty, truncated or not safetensors") from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path}: safetensors, but not exported by this project's sample.py")
    try:
        config, run = json.loads(metadata["config"]), json.loads(metadata["run"])
        check_run(run, path)
        return weights, config, run
    except (KeyError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: its config does not read: {error}") from error


def load_into(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """`load_state_dict`, with what does not fit in one sentence; a model on the meta device takes the tensors over.

    Raises:
        CheckpointError: a key, shape or dtype differs; names the first.
    """
    own = model.state_dict()
    if own.keys() != weights.keys():
        odd = sorted(own.keys() ^ weights.keys())
        raise CheckpointError(f"{path}: {len(odd)} weights are missing or unknown, {odd[0]!r} first")
    for name, tensor in own.items():
        found = weights[name]
        if not isinstance(found, Tensor) or (found.shape, found.dtype) != (tensor.shape, tensor.dtype):
            got = f"{tuple(found.shape)} {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
            raise CheckpointError(f"{path}: {name} is {got}; the model has {tuple(tensor.shape)} {tensor.dtype}")
    model.load_state_dict(weights, assign=next(iter(own.values())).is_meta)


def restore(
    contents: dict,
    path: Path,
    model: nn.Module,
    ema_model: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> int:
    """Put a checkpoint's contents into the parts of a training, and return the number of steps done.

    Args:
        path: the run, for messages.

    Raises:
        CheckpointError: something does not fit, named.
    """
    load_into(model, contents["model"], path)
    if ema_model is not None:
        if contents["ema"] is None:
            raise CheckpointError(f"{path}: holds no EMA weights, but the run's config has an ema_decay")
        load_into(ema_model, contents["ema"], path)
    try:
        optimizer.load_state_dict(contents["optimizer"])
        if contents["scaler"]:
            scaler.load_state_dict(contents["scaler"])
        return int(contents["run"]["step"])
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: the optimiser's state does not fit: {error}") from error
