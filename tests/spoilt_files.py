"""What tests of spoilt files share: a small training, its checkpoint in parts, and ways to spoil files."""

import copy
import functools
import io
import json
import random
import re
import struct
import zipfile

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
    None,
    True,
    0,
    1,
    -1,
    7,
    10**6,
    10**12,
    2**63,
    10**400,
    0.5,
    -1.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\x1b[2J\n\u202e\ud800",
    "y" * 9999,
    [],
    {},
    [0],
    [1, 2, 4],
    [10**9],
    [1] * 9999,
    ["1"],
    [[]],
    {"a": 1},
    json.loads("[" * 200 + "]" * 200),
)
# Signature, offset and type of fields of a zip: of a member in the directory and before its data, and of the end
ZIP_FIELDS = (
    *((b"PK\1\2", at, "H") for at in (8, 10, 28, 30)),
    *((b"PK\1\2", at, "I") for at in (16, 20, 24, 38, 42)),
    *((b"PK\3\4", at, "H") for at in (6, 8, 26, 28)),
    *((b"PK\5\6", at, "I") for at in (8, 12, 16, 18)),
)


def same(a: object, b: object) -> bool:
    """Equality to the bit of nested containers of plain values and tensors."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return (
            isinstance(a, Tensor)
            and isinstance(b, Tensor)
            and a.dtype == b.dtype
            and torch.equal(a, b)
        )
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


def tiny_experiment() -> Experiment:
    """Three thousand parameters, all parts of a training."""
    tiny = {
        "image_size": 4,
        "lowest_resolution_size": 4,
        "dim_multiply": (1,),
        "transformer_layers": (),
        "base_dim": 4,
    }
    return EXPERIMENTS["faces"].override(
        {"timesteps_diff": 30, "precision": "float32"}, {**tiny, "norm_groups": 1}
    )


def training_state(seed: int = 0) -> TrainingState:
    """Model, its average, Adam and a gradient scaler, as train.py makes them."""
    torch.manual_seed(seed)
    model = UNet(**vars(tiny_experiment().model)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    return TrainingState(
        model, copy.deepcopy(model), optimizer, torch.amp.GradScaler("cpu", enabled=True)
    )


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
    run = {
        "experiment": "faces",
        "total_steps": 90,
        "step": 5,
        "train_ids_hash": "0123456789abcdef",
        **how,
        "window": {"sums": [12.5, 9.5], "steps": 3},
        "bad_numbers": BadNumbers(CPU).state(),
    }
    contents = {
        "config": tiny_experiment().to_dict(),
        "run": run,
        "scaler": state.scaler.state_dict(),
    }
    return copy.deepcopy(state.tensors()), json.loads(json.dumps(contents))


def header_of(whole: bytes) -> bytes:
    return whole[8 : 8 + int.from_bytes(whole[:8], "little")]


def with_header(whole: bytes, header: dict | bytes) -> bytes:
    """A file with another header, and its right length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + whole[8 + len(header_of(whole)) :]


def with_contents(whole: bytes, contents: dict | str) -> bytes:
    """A file with other contents, and their right checksum."""
    header, text = (
        json.loads(header_of(whole)),
        contents if isinstance(contents, str) else json.dumps(contents),
    )
    header["__metadata__"] |= {"contents": text, "sha256": sha256(text)}
    return with_header(whole, header)


def contents_text(whole: bytes) -> str:
    return json.loads(header_of(whole))["__metadata__"]["contents"]


def spoil_bytes(data: bytes, rng: random.Random) -> bytes:
    """Spoil data in one to three places, often near its ends, where headers are."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        near = min(rng.randrange(300), len(data))
        at = rng.choice((near, len(data) - near, rng.randint(0, len(data))))
        data = data[:at] + spoilt_from(at, data, rng)
    return data


def spoilt_from(at: int, data: bytes, rng: random.Random) -> bytes:
    """What takes the place of all that follows: another block and the same rest, or none, or anything of the data."""
    size = int(2 ** rng.uniform(0, 12))
    block, after = data[at : at + size], data[at + size :]
    changes = {
        "flip": lambda: (
            bytes(byte ^ 1 << rng.randrange(8) for byte in block[:1]) + block[1:] + after
        ),
        "randomise": lambda: rng.randbytes(len(block)) + after,
        "blank": lambda: bytes(len(block)) + after,
        "remove": lambda: after,
        "double": lambda: block * 2 + after,
        "end": lambda: b"",
        "jump": lambda: data[rng.randint(0, len(data)) :],
    }
    (change,) = rng.choices([*changes.values()], weights=(3, 1, 1, 1, 1, 1, 1))
    return change()


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def spoilt_zip(members: dict[str, bytes], rng: random.Random) -> bytes:
    """A zip with spoilt bytes, or with a lie in one of its headers."""
    whole = zipped(members, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))
    if rng.random() < 0.5:
        return spoil_bytes(whole, rng)
    data, (signature, offset, code) = bytearray(whole), rng.choice(ZIP_FIELDS)
    value = rng.choice((0, 1, 8, 12, 93, 0x7FFF, 0xFFFF, 10**6, 0xA000 << 16, 2**31, 2**32 - 1))
    header = rng.choice([match.start() for match in re.finditer(signature, whole)])
    struct.pack_into(
        f"<{code}", data, header + offset, min(value, 0xFFFF) if code == "H" else value
    )
    return bytes(data)


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
        key = (
            rng.choice(("extra", "", "\x1b[2J\n", "z" * 5000))
            if action == "add" and isinstance(tree, dict)
            else key
        )
        tree[key] = json.loads(json.dumps(rng.choice(HOSTILE)))
