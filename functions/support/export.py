"""Weights to sample from: out of a checkpoint, or out of a .safetensors file of their own, to publish.

An exported file has in its header, as JSON, the config and the part `run` of the checkpoint, and a SHA-256 over these
and the weights: unlike a checkpoint's, the format itself has no checksums.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from functions.support.checkpoint import (
    FORMAT,
    check_run,
    check_values,
    load_checkpoint,
    short,
    write_whole,
)
from functions.support.errors import CheckpointError


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
        weights, config, run = load_exported(path, "cpu")
        kind = run["weights"]
    else:
        contents = load_checkpoint(path)
        kind = "EMA" if contents["ema"] is not None else "raw"
        weights, config, run = contents["ema" if kind == "EMA" else "model"], contents["config"], contents["run"]
    return SavedModel(path, weights, kind, config, run, checksum(weights, json.dumps(config, sort_keys=True), ""))


def export_weights(saved: SavedModel, path: Path) -> None:
    """Write what `load_weights` returned as a file of its own, to publish.

    Raises:
        CheckpointError: the file's name is not one by which it would be known.
    """
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: an exported file's name must end in .safetensors, by which it is known")
    weights = {name: tensor.contiguous() for name, tensor in saved.weights.items()}
    texts = {"config": json.dumps(saved.config), "run": json.dumps({**saved.run, "weights": saved.kind})}
    metadata = {"format": FORMAT, **texts, "sha256": checksum(weights, **texts)}
    write_whole(path, lambda file: file.write(save(weights, metadata)))


def load_exported(path: Path, device: torch.device | str) -> tuple[dict[str, Tensor], dict, dict]:
    """The inverse of `export_weights`.

    Raises:
        CheckpointError: the file is missing, truncated, damaged, or not one of ours.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: the file is empty, truncated, damaged or not safetensors") from error
    if metadata.get("format") != FORMAT or not {"config", "run"} <= metadata.keys():
        raise CheckpointError(f"{path}: safetensors, but not exported by this project's sample.py")
    if "sha256" not in metadata:
        raise CheckpointError(f"{path}: exported before files had a checksum; export it again with sample.py --export")
    if metadata["sha256"] != checksum(weights, metadata["config"], metadata["run"]):
        raise CheckpointError(f"{path}: the file is damaged: it does not match its checksum")
    try:
        config, run = json.loads(metadata["config"]), json.loads(metadata["run"])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its config does not read: {short(error)}") from error
    if not isinstance(config, dict) or not isinstance(run, dict):
        raise CheckpointError(f"{path}: its config or run is malformed")
    check_values({"config": config, "run": run, "weights": weights}, path)
    check_run(run, path)
    if run.get("weights") not in ("EMA", "raw"):
        raise CheckpointError(f"{path}: it does not say whether its weights are EMA's or the raw ones")
    return {name: tensor.to(device) for name, tensor in weights.items()}, config, run


def checksum(weights: dict[str, Tensor], config: str, run: str) -> str:
    """SHA-256 over both texts, each tensor's name, type and shape, and then all their bytes, in order of the names."""
    names = sorted(weights)
    header = [config, run, [[name, str(weights[name].dtype), list(weights[name].shape)] for name in names]]
    total = hashlib.sha256(json.dumps(header).encode())
    for name in names:
        total.update(weights[name].contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()
