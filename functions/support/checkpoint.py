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

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from functions.support.errors import CheckpointError
from functions.support.file_checks import READ_ERRORS, check_values, check_whole, short

FORMAT = "ddpm-faces checkpoint 1"
MOST_STEPS = 10**8  # file names have room for eight digits
# What a training keeps in the part `run` to go on with, and samplers never look at
PROGRESS = {
    "window": {"loss_sum": float, "steps": int},
    "bad_numbers": {"step": int, "skipped": int, "in_a_row": int, "longest": int, "last": list},
    "arithmetic": {"precision": str, "memory_format": str, "processor": str, "threads": int, "processes": int,
                   "batch_size": int, "torch": str},
}  # fmt: skip
PARTS = {"config": dict, "run": dict, "model": dict, "ema": (dict, type(None)), "optimizer": dict, "scaler": dict}


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
    try:
        write_whole(path, lambda file: torch.save({"format": FORMAT, **parts}, file))
    except RuntimeError as error:  # PyTorch hides a full disk's error behind one of its own
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None


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
    check_values(contents, path)
    check_run(contents["run"], path)
    return contents


def check_run(run: dict, path: Path) -> None:
    """`CheckpointError` unless the part `run` says which run this is and where it stood."""
    if not isinstance(run.get("experiment"), str):
        raise CheckpointError(f"{path}: the checkpoint's part 'run' has no proper 'experiment'")
    for name, most in {"total_steps": MOST_STEPS, "step": run.get("total_steps")}.items():
        if type(run.get(name)) is not int or not 0 <= run[name] <= most:
            raise CheckpointError(f"{path}: the checkpoint's part 'run' has no proper {name!r}")


def check_progress(run: dict, path: Path) -> None:
    """`CheckpointError` unless the part `run` has all that a training goes on with; samplers do without it."""
    if isinstance(run.get("arithmetic"), dict):
        run["arithmetic"].pop("compiled", None)  # which runs of earlier versions have
    for name, kinds in PROGRESS.items():
        value = run.get(name)
        proper = isinstance(value, dict) and {key: type(item) for key, item in value.items()} == kinds
        if not proper or any(type(number) is not float for number in value.get("last", [])):
            raise CheckpointError(
                f"{path}: its {name!r} is not what this version writes, so its training cannot go on exactly; "
                "it can be sampled from"
            )


def load_into(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """`load_state_dict`, with what does not fit in one sentence; a model on the meta device takes the tensors over.

    Raises:
        CheckpointError: as `check_fit`; the model is as it was.
    """
    own = model.state_dict()
    check_fit(own, weights, path, "weights")
    # As a plain dict, for a state dict out of a file may carry attributes that PyTorch would follow
    model.load_state_dict(dict(weights), assign=next(iter(own.values())).is_meta)


def check_fit(own: dict[str, Tensor], found: dict, path: Path, what: str) -> None:
    """`CheckpointError` when a key, shape or dtype differs; names the first. `what` they are goes into the message."""
    if own.keys() != found.keys():
        odd = sorted(map(str, own.keys() ^ found.keys()))
        raise CheckpointError(f"{path}: {len(odd)} {what} are missing or unknown, {short(odd[0])!r} first")
    for name, tensor in own.items():
        value = found[name]
        if not isinstance(value, Tensor) or (value.shape, value.dtype) != (tensor.shape, tensor.dtype):
            got = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise CheckpointError(f"{path}: {name} is {got}; the model has {tuple(tensor.shape)} {tensor.dtype}")


def restore(
    contents: dict,
    path: Path,
    model: nn.Module,
    ema_model: nn.Module | None,
    optimizer: torch.optim.Adam,
    scaler: torch.amp.GradScaler,
) -> int:
    """Put a checkpoint's contents into the parts of a training, and return the number of steps done.

    Of the optimiser only the state is taken: its settings are the program's, and must be what they were.

    Args:
        path: the run, for messages.

    Raises:
        CheckpointError: something does not fit, named; all parts are as they were.
    """
    check_fit(model.state_dict(), contents["model"], path, "weights")
    if ema_model is not None:
        if contents["ema"] is None:
            raise CheckpointError(f"{path}: holds no EMA weights, but the run's config has an ema_decay")
        check_fit(ema_model.state_dict(), contents["ema"], path, "EMA weights")
    check_optimizer(contents["optimizer"], optimizer, model, path)
    own_scaler = scaler.state_dict()
    if own_scaler and contents["scaler"]:
        check_scaler(contents["scaler"], own_scaler, path)
    # Nothing has been changed so far, and nothing of what follows can fail
    load_into(model, contents["model"], path)
    if ema_model is not None:
        load_into(ema_model, contents["ema"], path)
    own_groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": contents["optimizer"]["state"], "param_groups": own_groups})
    if own_scaler and contents["scaler"]:
        scaler.load_state_dict(contents["scaler"])
    return contents["run"]["step"]


def check_optimizer(saved: dict, optimizer: torch.optim.Adam, model: nn.Module, path: Path) -> None:
    """`CheckpointError` unless a saved Adam has this one's settings, and moments for every parameter of the model."""
    own_groups, groups = optimizer.state_dict()["param_groups"], saved.get("param_groups")
    if not isinstance(groups, list) or [type(group) for group in groups] != [dict] * len(own_groups):
        raise CheckpointError(f"{path}: the optimiser's 'param_groups' are missing or malformed")
    for own, group in zip(own_groups, groups, strict=True):
        for name in ("params", "betas", "eps", "weight_decay", "amsgrad", "maximize"):  # not lr, set in every step
            if repr(group.get(name)) != repr(own[name]):
                raise CheckpointError(
                    f"{path}: the optimiser's {name!r} is {short(group.get(name))}; it must be {short(own[name])}"
                )
    state = saved.get("state")
    if not isinstance(state, dict) or not all(isinstance(entry, dict) for entry in state.values()):
        raise CheckpointError(f"{path}: the optimiser's 'state' is missing or malformed")
    names, own, found = {}, {}, {}
    for i, (name, parameter) in enumerate(model.named_parameters()):
        names[i] = name
        moments = {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
        own |= {f"{name}'s {moment}": like for moment, like in moments.items()}
    for i, entry in state.items():
        found |= {f"{names.get(i, i)}'s {short(moment)}": value for moment, value in entry.items()}
    check_fit(own, found, path, "moments of the optimiser")
    for name, value in found.items():
        if not name.endswith("exp_avg") and value.numel() and value.min() < 0:  # its root would be no number
            raise CheckpointError(f"{path}: {name} is negative")


def check_scaler(saved: dict, own: dict, path: Path) -> None:
    """`CheckpointError` unless a saved gradient scaler has this one's settings, and a scale that scales."""
    for name in sorted(own.keys() | saved.keys(), key=str):
        value = saved.get(name)
        if name == "scale":
            proper = type(value) is float and 0 < value < float("inf")
        elif name == "_growth_tracker":
            proper = type(value) is int and 0 <= value < own["growth_interval"]
        else:
            proper = name in own and repr(value) == repr(own[name])
        if not proper:
            raise CheckpointError(f"{path}: the gradient scaler's {short(name)!r} is {short(value)}, which cannot be")
