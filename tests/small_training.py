"""What tests of checkpoints share: a small training, and the parts of its checkpoint."""

import copy
import functools
import json
import tempfile
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from config import EXPERIMENTS
from functions.saved.checkpoint import Tensors
from functions.training.opening import make_run
from functions.training.run import TrainingRun
from tests.conftest import CPU, draw_pictures


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


@functools.cache
def tiny_pictures() -> tempfile.TemporaryDirectory:
    """Return a folder of pictures, which is deleted when Python ends."""
    folder = tempfile.TemporaryDirectory()
    draw_pictures(Path(folder.name))
    return folder


def training_run(seed: int = 0, optimizer: str = "adam") -> TrainingRun:
    """Return a new run, with a scaler of the loss as on a GPU."""
    changes = {"timesteps_diff": 30, "precision": "float32"}
    changes |= {"dataset_name": tiny_pictures().name, "seed": seed, "optimizer": optimizer}
    # It has three thousand parameters, and all parts of a training.
    model = {
        "image_size": 4,
        "lowest_resolution_size": 4,
        "dim_multiply": (1,),
        "transformer_layers": (),
        "base_dim": 4,
        "norm_groups": 1,
    }
    experiment = EXPERIMENTS["faces"].override(**changes, **model)
    run = make_run("faces", experiment, Path("runs"), CPU)
    run.scaler = torch.amp.GradScaler("cpu", enabled=True)
    return run


def snapshot(run: TrainingRun) -> list:
    """Copy all that `TrainingRun.load` could change."""
    return copy.deepcopy([run.parts(), run.scaler.state_dict()])


@functools.cache
def stepped_run(seed: int, optimizer: str = "adam") -> TrainingRun:
    """Return a run after one step; all callers with the same arguments share it."""
    run = training_run(seed, optimizer)
    for parameter in run.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    run.optimizer.step()
    run.step = 1
    run.window.add(torch.tensor([12.5 + seed, 9.5, 8.0]), torch.tensor(0.0))
    return run


def checkpoint_parts() -> tuple[dict[str, Tensors], dict]:
    """Return parts and contents as `write_tensors` takes them; callers may change both."""
    with mock.patch("functions.training.run.write_tensors") as write:
        stepped_run(0).save(Path("never written"))
    _, parts, contents = write.call_args.args
    # Tuples become lists, as they do in a file.
    return copy.deepcopy(parts), json.loads(json.dumps(contents))
