"""Checkpoints: one file holds all that a training goes on from, and that a model is rebuilt from.

functions/support/files.py describes the format, and this module says what the file holds:

tensors    model.NAME and ema.NAME are the raw and the averaged weights; step.NAME, exp_avg.NAME
           and exp_avg_sq.NAME are Adam's state
contents   `config` is {"diffusion": {...}, "model": {...}}; `run` has experiment, step,
           the `Facts` of the run, and the counters that `Recorder.save` adds; `scaler` is the
           state of float16's gradient scaler, and empty without it

An exported file has only the weights to sample from, and is read in the same way.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from config import ModelConfig
from functions.support.errors import CheckpointError
from functions.support.files import TensorFile, sha256, short, write_tensors

# These are Adam's own names for what it keeps of each parameter.
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class TrainingState:
    """Hold what the steps of a training change."""

    model: nn.Module
    ema_model: nn.Module | None
    optimizer: torch.optim.Adam
    scaler: torch.amp.GradScaler

    def __post_init__(self) -> None:
        # Adam would make its state in its first step. A checkpoint needs it to be there before.
        for p in self.model.parameters():
            self.optimizer.state[p] = {
                "step": torch.zeros((), device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }

    def tensors(self) -> dict[str, Tensor]:
        """Return all but the scaler, by the names that tensors have in a checkpoint."""
        tensors = self.model.state_dict(prefix="model.")
        if self.ema_model:
            tensors.update(self.ema_model.state_dict(prefix="ema."))
        for moment in MOMENTS:
            for name, p in self.model.named_parameters():
                tensors[f"{moment}.{name}"] = self.optimizer.state[p][moment]
        return tensors

    def load(self, file: TensorFile) -> None:
        """Take a checkpoint's numbers over; memory layouts stay as they are.

        Raises CheckpointError, with nothing changed, when the checkpoint does not fit.
        """
        tensors = self.tensors()
        saved = file.tensors()
        check_fit(tensors, saved, file.path)
        for name, tensor in saved.items():
            # Adam takes the roots of exp_avg_sq and of 1 - beta_2^step, which must not be negative.
            if name.startswith(("step.", "exp_avg_sq.")) and (tensor < 0).any():
                raise CheckpointError(f"{file.path}: {name} is negative")

        scaler = self.scaler.state_dict()
        saved_scaler = file.contents["scaler"]
        # Either is empty where the precision is not float16, and then the scaler stays as it is.
        if scaler and saved_scaler:
            scale = saved_scaler.get("scale")
            tracker = saved_scaler.get("_growth_tracker")
            scale_fits = type(scale) is float and 0 < scale < 2**127
            tracker_fits = type(tracker) is int and 0 <= tracker < 2**31
            if not (scale_fits and tracker_fits):
                raise CheckpointError(
                    f"{file.path}: its gradient scaler has scale {short(scale)}, which cannot be"
                )
            scaler |= {"scale": scale, "_growth_tracker": tracker}

        # Nothing has changed up to here, and nothing that follows can fail.
        for name, tensor in tensors.items():
            tensor.copy_(saved[name])
        self.scaler.load_state_dict(scaler)


@dataclass(frozen=True)
class SavedModel:
    """Hold what sampling needs of a checkpoint or an exported file."""

    path: Path
    weights: dict[str, Tensor]
    # The kind of the weights is "EMA", or "raw" where the run has no EMA; those of a folder of
    # diffusers are "diffusers".
    kind: str
    # {"diffusion": {...}, "model": {...}}
    config: dict
    # This has experiment, step and total_steps, which is 0 where nobody knows it. A checkpoint's
    # has more.
    run: dict
    # The hash of weights and config is the same for a checkpoint and what is exported from it.
    digest: str

    @property
    def model(self) -> ModelConfig:
        """Return the network's config. Raises ConfigError or TypeError when it describes none."""
        return ModelConfig(**self.config["model"])

    @property
    def name(self) -> str:
        """Return the name that this model's results are called by."""
        return self.run["experiment"] if self.path.is_dir() else self.path.stem

    def __str__(self) -> str:
        text = f"{self.kind} weights"
        if self.run["total_steps"]:
            text += f" after {self.run['step']:,} of {self.run['total_steps']:,} steps"
        text += f", hash {self.digest[:16]}"
        if self.run.get("note"):
            text += f"; {self.run['note']}"
        return text


def save_checkpoint(path: Path, config: dict, run: dict, state: TrainingState) -> None:
    """Write a checkpoint. Raises OSError when the disk is full, or the like."""
    contents = {"config": config, "run": run, "scaler": state.scaler.state_dict()}
    write_tensors(path, state.tensors(), contents)


def open_checkpoint(path: Path) -> TensorFile:
    """Open a checkpoint and check its contents, without reading a tensor.

    Raises CheckpointError as `TensorFile` does, and when the contents are malformed.
    """
    file = TensorFile(path)
    for part in ("config", "run", "scaler"):
        if not isinstance(file.contents.get(part), dict):
            raise CheckpointError(f"{path}: its part {part!r} is missing or malformed")

    run = file.contents["run"]
    # A model that came from diffusers has no arithmetic.
    arithmetic = run.get("arithmetic", {})
    if not isinstance(run.get("experiment"), str) or not isinstance(arithmetic, dict):
        raise CheckpointError(f"{path}: its part 'run' has no proper 'experiment' or 'arithmetic'")

    # The names of files have 8 digits for a step. The total is checked first, as it is the bound
    # of the step.
    for name, most in {"total_steps": 10**8, "step": run.get("total_steps")}.items():
        if type(run.get(name)) is not int or not 0 <= run[name] <= most:
            raise CheckpointError(f"{path}: its part 'run' has no proper {name!r}")
    return file


def check_whole(path: Path) -> TensorFile:
    """Open a checkpoint, and read every tensor to compare it with its checksum.

    Raises CheckpointError as `open_checkpoint` does, and for a damaged tensor.
    """
    file = open_checkpoint(path)
    file.tensors()
    return file


def load_weights(path: Path) -> SavedModel:
    """Read the EMA weights of a checkpoint or an exported file; the raw ones if there is no EMA.

    No other tensors are read. Raises CheckpointError as `open_checkpoint` does, when the weights
    are damaged, and when the file has averages but none that is called ema.NAME.
    """
    file = open_checkpoint(path)
    part, kind = "ema.", "EMA"
    weights = file.tensors(part)
    if not weights:
        # Raw weights are no stand-in for an average of another name, such as ema_0.9999.NAME.
        for name in file.checksums:
            if name.startswith("ema"):
                raise CheckpointError(
                    f"{path}: none of its averages is called ema.NAME, as the one to sample from "
                    f"must be; the first is {short(name)}"
                )
        part, kind = "model.", "raw"
        weights = file.tensors(part)
    checksums = {name: file.checksums[part + name] for name in weights}
    config = file.contents["config"]
    digest = digest_of(config, checksums)
    return SavedModel(path, weights, kind, config, file.contents["run"], digest)


def digest_of(config: dict, checksums: dict[str, str]) -> str:
    """Return a hash of a model: of its config and of the checksum of each of its weights."""
    return sha256(json.dumps([config, sorted(checksums.items())], sort_keys=True))


def export_weights(saved: SavedModel, path: Path) -> None:
    """Write a model as a file of its own, to publish."""
    part = "ema" if saved.kind == "EMA" else "model"
    weights = {f"{part}.{name}": tensor for name, tensor in saved.weights.items()}
    write_tensors(path, weights, {"config": saved.config, "run": saved.run, "scaler": {}})


def load_into(model: nn.Module, saved: SavedModel) -> None:
    """Give a model these weights. Raises CheckpointError when they do not fit."""
    check_fit(model.state_dict(), saved.weights, saved.path)
    # A model on the meta device has no memory to copy to, so it takes the tensors themselves.
    model.load_state_dict(saved.weights, assign=next(model.parameters()).is_meta)


def check_fit(expected: dict[str, Tensor], found: dict[str, Tensor], path: Path) -> None:
    """Raise CheckpointError when a tensor's name, shape or type differs, and name the first."""
    odd = sorted(expected.keys() ^ found.keys())
    if odd:
        raise CheckpointError(
            f"{path}: {len(odd)} weights are missing or unknown, {short(odd[0])!r} first"
        )
    for name, tensor in expected.items():
        other = found[name]
        expected_kind = f"{tensor.dtype} {tuple(tensor.shape)}"
        found_kind = f"{other.dtype} {tuple(other.shape)}"
        if found_kind != expected_kind:
            raise CheckpointError(
                f"{path}: {name} is {short(found_kind)}; the model has {expected_kind}"
            )
