"""Load trained models: the one way in for all scripts and figures, and for your own code.

denoiser = load_denoiser("runs/faces-20260101-120000")
"""

import copy
from pathlib import Path

import torch
from torch import nn

from config import DiffusionConfig
from functions.denoiser import OBJECTIVES, Denoiser
from functions.saved.checkpoint import SavedModel, copy_tensors, load_model
from functions.support.device import choose_precision, fast_layout
from functions.support.errors import CheckpointError, printable
from functions.support.settings import ConfigError, row_of
from models.networks import build_network


def load_denoiser(
    path: Path | str,
    device: torch.device | str = "cpu",
    precision: str = "float32",
    network: nn.Module | None = None,
) -> Denoiser:
    """Load the model of a run's newest checkpoint, a checkpoint, an exported file or a folder.

    It has the EMA weights, or the raw ones if there is no EMA. A copy of a `network` of your own
    gets them; by default the network is built by the saved config. Raises CheckpointError when
    there is no model, when it is damaged, or when it needs a network of your own.
    """
    return open_model(Path(path), torch.device(device), precision, network)[1]


def open_model(
    path: Path,
    device: torch.device,
    precision: str = "float32",
    network: nn.Module | None = None,
) -> tuple[SavedModel, Denoiser]:
    """Load a model in all processes. Return what was saved, with its provenance, and a denoiser.

    Args:
        path: as for `load_model`.
        precision: a name, or "auto": that of the training, or float32 where that is not native.
        network: a copy of it gets the weights; by default it is built by the saved config.

    Raises CheckpointError for a config that builds no model, or one that the weights do not fit.
    """
    saved = load_model(path)
    try:
        scheduler = saved.scheduler
        objective = saved.config["diffusion"].get("objective", DiffusionConfig.objective)
        row_of(OBJECTIVES, "objective", objective)
        network = build_network(saved.model) if network is None else copy.deepcopy(network)
    except (ConfigError, ValueError) as error:
        raise CheckpointError(
            f"{saved.path}: this version cannot build a model from its config: {printable(error)}"
        ) from error
    copy_tensors(saved.weights, network.state_dict(), saved.path)
    network.to(device, memory_format=fast_layout(device)).eval().requires_grad_(False)
    trained = saved.provenance.get("arithmetic", {}).get("precision")
    dtype = choose_precision(precision, device, trained, "float32")
    return saved, Denoiser(network, scheduler, objective, dtype)
