"""What tests of spoilt files share: a small training, its checkpoint in parts, and ways to spoil files."""

import copy
import functools
import json
import random

import torch
from torch import Tensor

from config import EXPERIMENTS, Experiment
from functions.support.checkpoint import TrainingState
from functions.support.device import arithmetic
from functions.support.files import sha256
from functions.training.bad_numbers import BadNumbers
from models.unet import UNet

CPU = torch.device("cpu")
HOSTILE = (  # what no config, header or checkpoint should hold in most places
    *(None, True, 0, 1, -1, 7, 10**6, 10**12, 2**63, 10**400, 0.5, -1.5, 1e308, float("nan"), float("inf"), "", "x"),
    *("\x1b[2J\n\u202e\ud800", "y" * 9999, [], {}, [0], [1, 2, 4], [10**9], [1] * 9999, ["1"], [[]], {"a": 1}),
    json.loads("[" * 200 + "]" * 200),
)


def same(a: object, b: object) -> bool:
    """Equality to the bit of nested containers of plain values and tensors."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


def tiny_experiment() -> Experiment:
    """Three thousand parameters, all parts of a training."""
    tiny = {"image_size": 4, "lowest_resolution_size": 4, "dim_multiply": (1,), "transformer_layers": (), "base_dim": 4}
    return EXPERIMENTS["faces"].override({"timesteps_diff": 30, "precision": "float32"}, {**tiny, "norm_groups": 1})


def training_state(seed: int = 0) -> TrainingState:
    """Model, its average, Adam and a gradient scaler, as train.py makes them."""
    torch.manual_seed(seed)
    model = UNet(**vars(tiny_experiment().model)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    return TrainingState(model, copy.deepcopy(model), optimizer, torch.amp.GradScaler("cpu", enabled=True))


def snapshot(state: TrainingState) -> list:
    """All that `TrainingState.load` could change, copied."""
    return copy.deepcopy([dict(part.state_dict()) for part in vars(state).values()])


@functools.cache
def stepped_state(seed: int) -> TrainingState:
    """After a step of Adam."""
    state = training_state(seed)
    for parameter in state.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    state.optimizer.step()
    return state


def checkpoint_parts(seed: int = 0) -> tuple[dict[str, Tensor], dict]:
    """Tensors and contents, as `write_tensors` takes them, to be changed at will."""
    state, how = stepped_state(seed), arithmetic(CPU, torch.float32, 1, 8)
    run = {"experiment": "faces", "total_steps": 90, "step": 5, "train_ids_hash": "0123456789abcdef", **how,
           "window": {"loss_sum": 12.5, "steps": 3}, "bad_numbers": BadNumbers(CPU).state()}  # fmt: skip
    contents = {"config": tiny_experiment().to_dict(), "run": run, "scaler": state.scaler.state_dict()}
    return copy.deepcopy(state.tensors()), json.loads(json.dumps(contents))


def header_of(whole: bytes) -> bytes:
    return whole[8 : 8 + int.from_bytes(whole[:8], "little")]


def with_header(whole: bytes, header: dict | bytes) -> bytes:
    """A file with another header, and its right length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + whole[8 + len(header_of(whole)) :]


def with_contents(whole: bytes, contents: dict | str) -> bytes:
    """A file with other contents, and their right checksum."""
    header, text = json.loads(header_of(whole)), contents if isinstance(contents, str) else json.dumps(contents)
    header["__metadata__"] |= {"contents": text, "sha256": sha256(text)}
    return with_header(whole, header)


def contents_text(whole: bytes) -> str:
    return json.loads(header_of(whole))["__metadata__"]["contents"]


def spoil_bytes(data: bytes, rng: random.Random) -> bytes:
    """Spoil data in one to three ways, often near its ends, where headers are."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        near, size = min(rng.randrange(300), len(data)), int(2 ** rng.uniform(0, 12))
        at = rng.choice((near, len(data) - near, rng.randint(0, len(data))))
        before, block, after = data[:at], data[at : at + size], data[at + size :]
        flipped = bytes(byte ^ 1 << rng.randrange(8) for byte in block[:1]) + block[1:]
        new = rng.choice((flipped, flipped, flipped, rng.randbytes(len(block)), bytes(len(block)), b"", block * 2))
        data = rng.choice((*[before + new + after] * 6, before, before + data[rng.randint(0, len(data)) :]))
    return data


def spoil_tree(tree: dict | list, rng: random.Random) -> None:
    """Change, remove or add one thing in nested dicts and lists, in place, as often near the root as deep."""
    key = rng.choice([*tree] if isinstance(tree, dict) else range(len(tree)))
    value, action = tree[key], rng.choice(("put", "put", "put", "change", "remove", "add"))
    if isinstance(value, (dict, list)) and value and rng.random() < 0.8:
        spoil_tree(value, rng)
    elif action == "remove" and len(tree) > 1:
        del tree[key]
    elif action == "change" and type(value) in (int, float):
        tree[key] = rng.choice((value * 2, value * 10**9, -value, value + 1))
    else:
        key = rng.choice(("extra", "", "\x1b[2J\n", "z" * 5000)) if action == "add" and isinstance(tree, dict) else key
        tree[key] = json.loads(json.dumps(rng.choice(HOSTILE)))
