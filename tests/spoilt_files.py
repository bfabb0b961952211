"""What tests of spoilt files share: a small training, its checkpoint's parts, and ways to spoil."""

import copy
import functools
import io
import json
import zipfile
from collections.abc import Callable

import torch
from torch import Tensor

from config import EXPERIMENTS, Experiment
from functions.optimizers import Adam
from functions.support.checkpoint import TrainingState
from functions.support.device import arithmetic
from functions.support.files import sha256
from functions.training.bad_numbers import BadNumbers
from models.unet import UNet

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


def training_state(seed: int = 0, kind: Callable[..., Adam] = Adam) -> TrainingState:
    """Return a model, its average, optimiser and gradient scaler, as train.py makes them."""
    torch.manual_seed(seed)
    model = UNet(**vars(tiny_experiment().model))
    model = model.to(memory_format=torch.channels_last)
    optimizer = kind(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    return TrainingState(model, copy.deepcopy(model), optimizer, scaler)


def snapshot(state: TrainingState) -> list:
    """Copy all that `TrainingState.load` could change."""
    parts = [state.model, state.ema_model, state.optimizer, state.scaler]
    return copy.deepcopy([dict(part.state_dict()) for part in parts])


@functools.cache
def stepped_state(seed: int, kind: Callable[..., Adam] = Adam) -> TrainingState:
    """Return a state after one step; all callers with the same arguments share it."""
    state = training_state(seed, kind)
    for parameter in state.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    state.optimizer.step()
    return state


def checkpoint_parts(seed: int = 0) -> tuple[dict[str, Tensor], dict]:
    """Return tensors and contents as `write_tensors` takes them; callers may change both."""
    state = stepped_state(seed)
    run = {
        "experiment": "faces",
        "total_steps": 90,
        "step": 5,
        "train_ids_hash": "0123456789abcdef",
        **arithmetic(CPU, torch.float32, 1, 8),
        "window": {"sums": [12.5, 9.5], "steps": 3},
        "bad_numbers": BadNumbers(CPU).state(),
    }
    contents = {
        "config": tiny_experiment().to_dict(),
        "run": run,
        "scaler": state.scaler.state_dict(),
    }
    # Tuples become lists, as they do in a file.
    contents = json.loads(json.dumps(contents))
    return copy.deepcopy(state.tensors()), contents


def header_of(whole: bytes) -> bytes:
    """Return the JSON header of a safetensors file, which follows its length in eight bytes."""
    length = int.from_bytes(whole[:8], "little")
    return whole[8 : 8 + length]


def with_header(whole: bytes, header: dict | bytes) -> bytes:
    """Return the file with another header and the right length of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    numbers = whole[8 + len(header_of(whole)) :]
    return len(text).to_bytes(8, "little") + text + numbers


def with_contents(whole: bytes, contents: dict | str) -> bytes:
    """Return the file with other contents and the right checksum of them."""
    text = contents if isinstance(contents, str) else json.dumps(contents)
    header = json.loads(header_of(whole))
    header["__metadata__"] |= {"contents": text, "sha256": sha256(text)}
    return with_header(whole, header)


def contents_text(whole: bytes) -> str:
    return json.loads(header_of(whole))["__metadata__"]["contents"]


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()
