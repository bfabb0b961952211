"""Read and write checkpoints: files to resume training from, and to rebuild a model from.

functions/support/files.py describes the format of the file, and docs/survival.md lists its tensors.
The file's `contents` are:

config     {"diffusion": {...}, "model": {...}}
run        the experiment, the step, the `Facts` of the run, and the counters of `Recorder.save`
scaler     the state of the gradient scaler for float16; empty in other precisions

An exported file has the same format, but its only tensors are the weights to sample from.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from config import ModelConfig
from functions.optimizers import Adam
from functions.support.errors import CheckpointError
from functions.support.files import TensorFile, sha256, short, write_tensors

# PyTorch uses these names for Adam's state of each parameter. For a matrix, Muon keeps only
# exp_avg.
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class TrainingState:
    """Hold what the steps of a training change."""

    model: nn.Module
    ema_model: nn.Module | None
    optimizer: Adam
    scaler: torch.amp.GradScaler

    def tensors(self) -> dict[str, Tensor]:
        """Return all but the scaler, by the names that tensors have in a checkpoint."""
        tensors = self.model.state_dict(prefix="model.")
        if self.ema_model:
            tensors.update(self.ema_model.state_dict(prefix="ema."))
        for moment in MOMENTS:
            for name, p in self.model.named_parameters():
                state = self.optimizer.state[p]
                if moment in state:
                    tensors[f"{moment}.{name}"] = state[moment]
        return tensors

    def load(self, file: TensorFile) -> None:
        """Take a checkpoint's numbers over; memory layouts stay as they are.

        Raises CheckpointError, with nothing changed, when the checkpoint does not fit.
        """
        tensors = self.tensors()
        saved = file.tensors()
        check_fit(tensors, saved, file.path)
        # Either state is empty where the precision is not float16. Then the scaler stays as it is.
        scaler = file.contents["scaler"]
        if scaler and self.scaler.is_enabled():
            self.scaler.load_state_dict(self.scaler.state_dict() | scaler)
        for name, tensor in tensors.items():
            tensor.copy_(saved[name])


@dataclass(frozen=True)
class SavedModel:
    """The part of a checkpoint or an exported file that sampling needs."""

    path: Path
    weights: dict[str, Tensor]
    # The kind of weights is "EMA", "raw" if the run has no EMA, or "diffusers" if they come from a
    # diffusers folder.
    kind: str
    # The config is {"diffusion": {...}, "model": {...}}.
    config: dict
    # This is the `run` part of the file. It has at least the keys experiment, step and total_steps,
    # which is 0 if the total is unknown.
    provenance: dict
    # This hash of config and weights is the same for a checkpoint and for a file exported from it.
    digest: str

    @property
    def model(self) -> ModelConfig:
        """Return the network's config. Raises ConfigError or TypeError for an invalid one."""
        return ModelConfig(**self.config["model"])

    @property
    def precision(self) -> str | None:
        """Return the precision in which the model was trained, or None if that is unknown."""
        return self.provenance.get("arithmetic", {}).get("precision")

    @property
    def name(self) -> str:
        """Return the model's name, for the names of its results."""
        return self.provenance["experiment"] if self.path.is_dir() else self.path.stem

    def __str__(self) -> str:
        facts = self.provenance
        text = f"{self.kind} weights"
        if facts["total_steps"]:
            text += f" after {facts['step']:,} of {facts['total_steps']:,} steps"
        text += f", hash {self.digest[:16]}"
        if facts.get("note"):
            text += f"; {facts['note']}"
        return text


def save_checkpoint(path: Path, config: dict, facts: dict, state: TrainingState) -> None:
    """Write a checkpoint, with `facts` as its `run`. Raises OSError, such as for a full disk."""
    contents = {"config": config, "run": facts, "scaler": state.scaler.state_dict()}
    write_tensors(path, state.tensors(), contents)


def save_snapshot(path: Path, config: dict, facts: dict, part: str, model: nn.Module) -> None:
    """Write a model to sample from, in float16. `part` is "ema" for averages, otherwise "model".

    Raises OSError, as when the disk is full.
    """
    # The copies are on the CPU, because a GPU may be full.
    weights = {
        f"{part}.{name}": tensor.to("cpu", torch.float16)
        for name, tensor in model.state_dict().items()
    }
    write_tensors(path, weights, {"config": config, "run": facts, "scaler": {}})


def open_checkpoint(path: Path) -> TensorFile:
    """Open a checkpoint and check its contents. This reads no tensor.

    Raises CheckpointError as `TensorFile` does, and when the contents are malformed.
    """
    file = TensorFile(path)
    for part in ("config", "run", "scaler"):
        if not isinstance(file.contents.get(part), dict):
            raise CheckpointError(f"{path}: its part {part!r} is missing or malformed")

    facts = file.contents["run"]
    # A model from a diffusers folder has no arithmetic.
    arithmetic = facts.get("arithmetic", {})
    if not isinstance(facts.get("experiment"), str) or not isinstance(arithmetic, dict):
        raise CheckpointError(
            f"{path}: in its part 'run', 'experiment' or 'arithmetic' is malformed"
        )

    # A step has at most 8 digits in file names. The total comes first because it bounds the step.
    for name, maximum in {"total_steps": 10**8, "step": facts.get("total_steps")}.items():
        if type(facts.get(name)) is not int or not 0 <= facts[name] <= maximum:
            raise CheckpointError(f"{path}: in its part 'run', {name!r} is missing or malformed")
    return file


def verify_checkpoint(path: Path) -> TensorFile:
    """Open a checkpoint, and compare every tensor with its checksum.

    Raises CheckpointError as `open_checkpoint` does, and for a damaged tensor.
    """
    file = open_checkpoint(path)
    file.tensors()
    return file


def load_weights(path: Path) -> SavedModel:
    """Read the EMA weights of a checkpoint or an exported file, or the raw ones if it has no EMA.

    No other tensors are read. Raises CheckpointError as `open_checkpoint` does, for damaged
    weights.
    """
    file = open_checkpoint(path)
    part, kind = "ema.", "EMA"
    weights = file.tensors(part)
    if not weights:
        part, kind = "model.", "raw"
        weights = file.tensors(part)
    checksums = {name: file.checksums[part + name] for name in weights}
    # Snapshots have float16. The network's own parameters are float32.
    for name, tensor in weights.items():
        if tensor.dtype == torch.float16:
            weights[name] = tensor.float()
    config = file.contents["config"]
    digest = digest_of(config, checksums)
    return SavedModel(path, weights, kind, config, file.contents["run"], digest)


def digest_of(config: dict, checksums: dict[str, str]) -> str:
    """Return a hash of a model's config and of the checksums of its weights."""
    return sha256(json.dumps([config, sorted(checksums.items())], sort_keys=True))


def export_weights(saved: SavedModel, path: Path) -> None:
    """Write a model to a file that can be published."""
    part = "ema" if saved.kind == "EMA" else "model"
    weights = {f"{part}.{name}": tensor for name, tensor in saved.weights.items()}
    write_tensors(path, weights, {"config": saved.config, "run": saved.provenance, "scaler": {}})


def load_into(model: nn.Module, saved: SavedModel) -> None:
    """Load saved weights into a model. Raises CheckpointError when they do not fit."""
    check_fit(model.state_dict(), saved.weights, saved.path)
    # A model on the meta device has no memory, so it uses the saved tensors themselves.
    model.load_state_dict(saved.weights, assign=next(model.parameters()).is_meta)


def check_fit(expected: dict[str, Tensor], weights: dict[str, Tensor], path: Path) -> None:
    """Raise CheckpointError for the first tensor whose name, shape or dtype differs."""
    mismatches = sorted(expected.keys() ^ weights.keys())
    if mismatches:
        raise CheckpointError(
            f"{path}: {len(mismatches)} weights are missing or unknown, "
            f"such as {short(mismatches[0])!r}"
        )
    for name, tensor in expected.items():
        weight = weights[name]
        expected_kind = f"{tensor.dtype} {tuple(tensor.shape)}"
        kind = f"{weight.dtype} {tuple(weight.shape)}"
        if kind != expected_kind:
            raise CheckpointError(f"{path}: {name} is {short(kind)}; the model has {expected_kind}")
