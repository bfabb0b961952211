"""What tests of spoilt files share: a small training, its checkpoint's parts, and ways to spoil."""

import copy
import functools
import json
import tempfile
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from config import EXPERIMENTS, Experiment
from functions.support.checkpoint import Tensors
from functions.support.files import sha256
from functions.training.run import TrainingRun
from tests.conftest import draw_pictures

CPU = torch.device("cpu")


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


def tiny_experiment() -> Experiment:
    """Return an experiment of three thousand parameters that has all parts of a training."""
    diffusion = {"timesteps_diff": 30, "precision": "float32"}
    model = {
        "image_size": 4,
        "lowest_resolution_size": 4,
        "dim_multiply": (1,),
        "transformer_layers": (),
        "base_dim": 4,
        "norm_groups": 1,
    }
    return EXPERIMENTS["faces"].override(diffusion, model)


@functools.cache
def tiny_pictures() -> tempfile.TemporaryDirectory:
    """Return a folder of pictures, which is deleted when Python ends."""
    folder = tempfile.TemporaryDirectory()
    draw_pictures(Path(folder.name))
    return folder


def training_run(seed: int = 0, optimizer: str = "adam") -> TrainingRun:
    """Return a new run as on a GPU: in channels_last, and with a scaler of the loss."""
    changes = {"dataset_name": tiny_pictures().name, "seed": seed, "optimizer": optimizer}
    experiment = tiny_experiment().override(changes, {})
    with mock.patch("functions.training.run.fast_layout", lambda *a, **k: torch.channels_last):
        run = TrainingRun("faces", experiment, Path("runs"), CPU)
    run.scaler = torch.amp.GradScaler("cpu", enabled=True)
    return run


def snapshot(run: TrainingRun) -> list:
    """Copy all that `TrainingRun.load` could change."""
    return copy.deepcopy([run.parts(), run.scaler.state_dict(), run.window.state()])


@functools.cache
def stepped_run(seed: int, optimizer: str = "adam") -> TrainingRun:
    """Return a run after one step; all callers with the same arguments share it."""
    run = training_run(seed, optimizer)
    for parameter in run.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    run.optimizer.step()
    run.step = 1
    run.window.add(torch.tensor([12.5 + seed, 9.5]), torch.tensor(0.0))
    return run


def checkpoint_parts() -> tuple[dict[str, Tensors], dict]:
    """Return parts and contents as `write_tensors` takes them; callers may change both."""
    with mock.patch("functions.training.run.write_tensors") as write:
        stepped_run(0).save(Path("never written"))
    _, parts, contents = write.call_args.args
    # Tuples become lists, as they do in a file.
    return copy.deepcopy(parts), json.loads(json.dumps(contents))


def header_of(whole: bytes) -> bytes:
    """Return the JSON header of a safetensors file, which follows its length in eight bytes."""
    length = int.from_bytes(whole[:8], "little")
    return whole[8 : 8 + length]


def with_contents(whole: bytes, contents: dict) -> bytes:
    """Return the file with other contents, and the right checksum and length of them."""
    header = json.loads(header_of(whole))
    text = json.dumps(contents)
    header["__metadata__"] |= {"contents": text, "sha256": sha256(text)}
    new = json.dumps(header).encode()
    return len(new).to_bytes(8, "little") + new + whole[8 + len(header_of(whole)) :]


def contents_text(whole: bytes) -> str:
    return json.loads(header_of(whole))["__metadata__"]["contents"]
