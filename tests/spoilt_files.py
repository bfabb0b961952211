"""What tests of spoilt files share: a small training, its checkpoint's parts, and ways to spoil."""

import copy
import functools
import io
import json
import random
import re
import struct
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
# In most places no config, header or checkpoint should hold one of these values.
HOSTILE = (
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
# Fields of a zip: the signature of a header, the offset in that header, and the type for struct.
ZIP_FIELDS = (
    # A member's entry in the directory holds flags, method, and lengths of name and extra data.
    *((b"PK\1\2", offset, "H") for offset in (8, 10, 28, 30)),
    # The same entry holds the checksum, both sizes, attributes, and the offset of the data.
    *((b"PK\1\2", offset, "I") for offset in (16, 20, 24, 38, 42)),
    # The header before a member's data holds flags, method and lengths again.
    *((b"PK\3\4", offset, "H") for offset in (6, 8, 26, 28)),
    # The end of the file says how many members there are, and where their directory lies.
    *((b"PK\5\6", offset, "I") for offset in (8, 12, 16, 18)),
)


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
    parts += state.power_emas.values()
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


def spoil_bytes(data: bytes, rng: random.Random) -> bytes:
    """Spoil data in one to three places, often near its ends, where headers are."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        near = min(rng.randrange(300), len(data))
        anywhere = rng.randint(0, len(data))
        place = rng.choice((near, len(data) - near, anywhere))
        data = data[:place] + spoilt_from(place, data, rng)
    return data


def spoilt_from(place: int, data: bytes, rng: random.Random) -> bytes:
    """Return what takes the place of all data from `place` on.

    This is a changed block and the same rest, or nothing, or the data from any other place on.
    """
    size = int(2 ** rng.uniform(0, 12))
    block = data[place : place + size]
    after = data[place + size :]

    changes = ("flip", "randomise", "blank", "remove", "double", "end", "jump")
    (change,) = rng.choices(changes, weights=(3, 1, 1, 1, 1, 1, 1))
    match change:
        case "flip":
            # At the end of the data the block is empty, and there is no bit to flip.
            first = bytes(byte ^ 1 << rng.randrange(8) for byte in block[:1])
            return first + block[1:] + after
        case "randomise":
            return rng.randbytes(len(block)) + after
        case "blank":
            return bytes(len(block)) + after
        case "remove":
            return after
        case "double":
            return block * 2 + after
        case "end":
            return b""
        case "jump":
            return data[rng.randint(0, len(data)) :]


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def spoilt_zip(members: dict[str, bytes], rng: random.Random) -> bytes:
    """Return a zip with spoilt bytes, or with a lie in one of its headers."""
    whole = zipped(members, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))
    if rng.random() < 0.5:
        return spoil_bytes(whole, rng)

    signature, offset, code = rng.choice(ZIP_FIELDS)
    value = rng.choice((0, 1, 8, 12, 93, 0x7FFF, 0xFFFF, 10**6, 0xA000 << 16, 2**31, 2**32 - 1))
    if code == "H":
        # Such a field has two bytes.
        value = min(value, 0xFFFF)

    # The signature can also occur by chance, within compressed data, which is then spoilt.
    header = rng.choice([match.start() for match in re.finditer(signature, whole)])
    data = bytearray(whole)
    struct.pack_into(f"<{code}", data, header + offset, value)
    return bytes(data)


def spoil_tree(tree: dict | list, rng: random.Random) -> None:
    """Change, remove or add one thing in nested dicts and lists, in place.

    This happens as often near the root as deep in the tree.
    """
    keys = [*tree] if isinstance(tree, dict) else range(len(tree))
    key = rng.choice(keys)
    value = tree[key]
    action = rng.choice(("put", "put", "put", "change", "remove", "add"))

    if isinstance(value, (dict, list)) and value and rng.random() < 0.8:
        spoil_tree(value, rng)
    elif action == "remove" and len(tree) > 1:
        del tree[key]
    elif action == "change" and type(value) in (int, float):
        tree[key] = rng.choice((value * 2, value * 10**9, -value, value + 1))
    else:
        if action == "add" and isinstance(tree, dict):
            key = rng.choice(("extra", "", "\x1b[2J\n", "z" * 5000))

        # A copy is put there, because another call may spoil what this one has put.
        tree[key] = json.loads(json.dumps(rng.choice(HOSTILE)))
