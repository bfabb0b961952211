"""What tests of checkpoints share: a small training, and what it means that two are the same."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from config import EXPERIMENTS
from data.arrays import from_array
from functions.training.run import TrainingRun
from models.networks import build_network
from tests.conftest import CPU


def same(a: object, b: object) -> bool:
    """Say whether nested containers of plain values and tensors are equal to the bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))

    # By their text a NaN equals itself, and -0.0 is not 0.0.
    return type(a) is type(b) and repr(a) == repr(b)


def training_run(seed: int = 0, **changes) -> TrainingRun:
    """Return a new run with these changes, with a scaler of the loss as on a GPU.

    Its network has three thousand parameters.
    """
    experiment = EXPERIMENTS["faces"].override(
        timesteps_diff=30,
        optimizer="adam",
        precision="float32",
        seed=seed,
        image_size=4,
        dim_multiply=(1,),
        transformer_layers=(),
        base_dim=4,
        norm_groups=1,
        **changes,
    )
    images = from_array("plain", np.zeros((50, 4, 4, 3), np.uint8))
    torch.manual_seed(seed)
    network = build_network(experiment.model)
    run = TrainingRun("faces", experiment, images, network, Path("runs"), CPU)
    run.scaler = torch.amp.GradScaler("cpu", enabled=True)
    return run


def stepped_run(seed: int = 0) -> TrainingRun:
    """Return a run after one step, which the average of the weights has not seen."""
    run = training_run(seed)
    for parameter in run.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    run.optimizer.step()
    run.step = 1
    return run
