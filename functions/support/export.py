"""Weights to sample from: out of a checkpoint, or out of a .safetensors file of their own, to publish."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from functions.support.checkpoint import check_run, load_checkpoint
from functions.support.errors import CheckpointError
from functions.support.files import TensorFile, checksum, write_tensors


@dataclass(frozen=True)
class SavedModel:
    """What sampling needs of a checkpoint or an exported file."""

    path: Path
    weights: dict[str, Tensor]
    kind: str  # of the weights: "EMA", or "raw" where the run has no EMA
    config: dict  # {"diffusion": {...}, "model": {...}}
    run: dict  # experiment, step, total_steps, and in a checkpoint more
    digest: str  # of weights and config: the same for a checkpoint and for what was exported from it

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        model = self.config["model"]
        return model["channels"], model["image_size"], model["image_size"]

    def __str__(self) -> str:
        return f"{self.path}: {self.kind} weights after {self.run['step']:,} of {self.run['total_steps']:,} steps"


def load_weights(path: Path) -> SavedModel:
    """The EMA weights of a checkpoint or an exported file, or the raw ones where it has no others.

    Raises:
        CheckpointError: the file is missing, truncated, damaged, or not one of ours.
    """
    if path.suffix == ".safetensors":
        file = TensorFile(path)
        part = "ema" if any(name.startswith("ema.") for name in file.checksums) else "model"
        weights, config, run = file.tensors(f"{part}."), file.contents["config"], file.contents["run"]
        check_run(run, path)
    else:
        contents = load_checkpoint(path)
        part = "ema" if contents["ema"] is not None else "model"
        weights, config, run = contents[part], contents["config"], contents["run"]
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    named = [[name, checksum(weights[name])] for name in sorted(weights)]
    digest = hashlib.sha256(json.dumps([config, named], sort_keys=True).encode()).hexdigest()
    return SavedModel(path, weights, "EMA" if part == "ema" else "raw", config, run, digest)


def export_weights(saved: SavedModel, path: Path) -> None:
    """Write a model as a file of its own, to publish.

    Raises:
        CheckpointError: the file's name is not one by which it would be known.
    """
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: an exported file's name must end in .safetensors, by which it is known")
    part = "ema" if saved.kind == "EMA" else "model"
    weights = {f"{part}.{name}": tensor for name, tensor in saved.weights.items()}
    write_tensors(path, weights, {"config": saved.config, "run": saved.run, "scaler": {}})
