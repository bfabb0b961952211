"""Checkpoints: all that a training goes on from, and that a model is rebuilt from, in one file of tensors.

Tensors    model.NAME, ema.NAME: the raw and the averaged weights; step.NAME, exp_avg.NAME, exp_avg_sq.NAME: Adam's
contents   `config`: {"diffusion": {...}, "model": {...}}; `run`: experiment, step, `run.facts` of train.py, and the
           counters that `BookKeeper.save` adds; `scaler`: float16's gradient scaler, empty without it
An exported file has the weights to sample from alone, and is read in the same way.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from functions.support.errors import CheckpointError
from functions.support.files import TensorFile, short, write_tensors

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # as Adam calls them


@dataclass(frozen=True)
class TrainingState:
    """What the steps of a training change."""

    model: nn.Module
    ema_model: nn.Module | None
    optimizer: torch.optim.Adam
    scaler: torch.amp.GradScaler

    def __post_init__(self) -> None:
        for p in self.model.parameters():  # which Adam would do in its first step
            step = torch.zeros((), device=p.device)
            self.optimizer.state[p] = {
                "step": step,
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }

    def tensors(self) -> dict[str, Tensor]:
        """All but the scaler, by name."""
        parts = {
            "model": self.model.state_dict(),
            "ema": self.ema_model.state_dict() if self.ema_model else {},
        }
        for moment in MOMENTS:
            parts[moment] = {
                name: self.optimizer.state[p][moment] for name, p in self.model.named_parameters()
            }
        return {
            f"{part}.{name}": tensor for part, own in parts.items() for name, tensor in own.items()
        }

    def load(self, file: TensorFile) -> None:
        """Take a checkpoint over, but for layouts. CheckpointError, with nothing changed, when it does not fit."""
        own, found = self.tensors(), file.tensors()
        check_fit(own, found, file.path)
        for name, tensor in found.items():
            # Whose root would be no number
            if name.startswith(("step.", "exp_avg_sq.")) and (tensor < 0).any():
                raise CheckpointError(f"{file.path}: {name} is negative")
        scaler = self.scaler.state_dict()
        if scaler and file.contents["scaler"]:
            scaler |= {
                name: file.contents["scaler"].get(name) for name in ("scale", "_growth_tracker")
            }
            scale, tracker = scaler["scale"], scaler["_growth_tracker"]
            if not (
                type(scale) is float
                and 0 < scale < 2**127
                and type(tracker) is int
                and 0 <= tracker < 2**31
            ):
                raise CheckpointError(
                    f"{file.path}: its gradient scaler has scale {short(scale)}, which cannot be"
                )
        # Nothing has been changed so far, and nothing of what follows can fail
        for name, tensor in own.items():
            tensor.copy_(found[name])
        self.scaler.load_state_dict(scaler)


@dataclass(frozen=True)
class SavedModel:
    """What sampling needs of a checkpoint or an exported file."""

    path: Path
    weights: dict[str, Tensor]
    # Of the weights: "EMA", or "raw" where the run has no EMA; "diffusers", of one of its folders
    kind: str
    config: dict  # {"diffusion": {...}, "model": {...}}
    run: dict  # experiment, step, total_steps (0 where nobody knows), and in a checkpoint more
    # Of weights and config: the same for a checkpoint and for what was exported from it
    digest: str

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        model = self.config["model"]
        return model["channels"], model["image_size"], model["image_size"]

    @property
    def name(self) -> str:
        """That its results are named by."""
        return self.run["experiment"] if self.path.is_dir() else self.path.stem

    def __str__(self) -> str:
        done = (
            f" after {self.run['step']:,} of {self.run['total_steps']:,} steps"
            if self.run["total_steps"]
            else ""
        )
        note = f"; {self.run['note']}" if self.run.get("note") else ""
        return f"{self.kind} weights{done}, hash {self.digest[:16]}{note}"


def save_checkpoint(path: Path, config: dict, run: dict, state: TrainingState) -> None:
    """Write a checkpoint. Raises OSError when the disk is full, or the like."""
    write_tensors(
        path, state.tensors(), {"config": config, "run": run, "scaler": state.scaler.state_dict()}
    )


def open_checkpoint(path: Path) -> TensorFile:
    """The file, with contents that are in order; no tensor is read yet. Raises CheckpointError as `TensorFile` does."""
    file = TensorFile(path)
    for part in ("config", "run", "scaler"):
        if not isinstance(file.contents.get(part), dict):
            raise CheckpointError(f"{path}: its part {part!r} is missing or malformed")
    run = file.contents["run"]
    if not isinstance(run.get("experiment"), str) or not isinstance(
        run.get("arithmetic", {}), dict
    ):
        raise CheckpointError(f"{path}: its part 'run' has no proper 'experiment' or 'arithmetic'")
    # Files' names have 8 digits
    for name, most in {"total_steps": 10**8, "step": run.get("total_steps")}.items():
        if type(run.get(name)) is not int or not 0 <= run[name] <= most:
            raise CheckpointError(f"{path}: its part 'run' has no proper {name!r}")
    return file


def check_whole(path: Path) -> TensorFile:
    """As `open_checkpoint`, and every tensor is read and compared with its checksum."""
    file = open_checkpoint(path)
    file.tensors()
    return file


def load_weights(path: Path) -> SavedModel:
    """The EMA weights of a checkpoint or an exported file, or the raw ones where it has no others; only these are read.

    Raises CheckpointError as `open_checkpoint` does, or when they are damaged.
    """
    file = open_checkpoint(path)
    part = "ema" if any(name.startswith("ema.") for name in file.checksums) else "model"
    weights, config = file.tensors(f"{part}."), file.contents["config"]
    digest = digest_of(config, {name: file.checksums[f"{part}.{name}"] for name in weights})
    return SavedModel(
        path, weights, "EMA" if part == "ema" else "raw", config, file.contents["run"], digest
    )


def digest_of(config: dict, checksums: dict[str, str]) -> str:
    """A hash of a model: of its config and of the checksum of each of its weights."""
    return hashlib.sha256(
        json.dumps([config, sorted(checksums.items())], sort_keys=True).encode()
    ).hexdigest()


def export_weights(saved: SavedModel, path: Path) -> None:
    """Write a model as a file of its own, to publish."""
    part = "ema" if saved.kind == "EMA" else "model"
    weights = {f"{part}.{name}": tensor for name, tensor in saved.weights.items()}
    write_tensors(path, weights, {"config": saved.config, "run": saved.run, "scaler": {}})


def load_into(model: nn.Module, saved: SavedModel) -> None:
    """Give a model these weights: as they are on the meta device, else copied. CheckpointError when they do not fit."""
    check_fit(model.state_dict(), saved.weights, saved.path)
    model.load_state_dict(saved.weights, assign=next(model.parameters()).is_meta)


def check_fit(own: dict[str, Tensor], found: dict[str, Tensor], path: Path) -> None:
    """Raise CheckpointError when the name, shape or type of a tensor differs; name the first."""
    if own.keys() != found.keys():
        odd = sorted(own.keys() ^ found.keys())
        raise CheckpointError(
            f"{path}: {len(odd)} weights are missing or unknown, {short(odd[0])!r} first"
        )
    for name, tensor in own.items():
        if (found[name].shape, found[name].dtype) != (tensor.shape, tensor.dtype):
            got = f"{found[name].dtype} {tuple(found[name].shape)}"
            raise CheckpointError(
                f"{path}: {name} is {short(got)}; the model has {tensor.dtype} {tuple(tensor.shape)}"
            )
