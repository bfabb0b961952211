"""Checkpoints and exported weights for tests/fuzz.py, and what all kinds share.

A kind knows what is whole, makes a case of it, reads that as the program would, and judges what came out.
"""

import copy
import functools
import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch

from config import EXPERIMENTS, ConfigError, Experiment
from functions.sampling.generation import rebuild
from functions.support.checkpoint import export_weights, load_checkpoint, load_weights, restore, save_checkpoint
from functions.support.device import arithmetic
from functions.support.errors import CheckpointError
from functions.training.bad_numbers import BadNumbers
from models.unet import UNet
from tests.fuzz_mutations import damage, rezip, spoil_tree

SAME, OTHER = "read as the original", "read with other values, as the file has them"
CPU = torch.device("cpu")


class Fault(Exception):
    """What must not happen, as it was seen."""


@dataclass
class Case:
    """A spoilt file (or value), and whether another result than the original's is right: it was built on purpose."""

    path: Path
    on_purpose: bool = False
    value: object = None


def same(a: object, b: object) -> bool:
    """Equality to the bit of nested containers of plain values and tensors."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        alike = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.dtype == b.dtype
        return alike and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


def judge_same(results: list, case: Case, result: object) -> str:
    """Like one of the originals, unless it was built on purpose to be another."""
    if any(same(result, original) for original in results):
        return SAME
    if case.on_purpose:
        return OTHER
    raise Fault("a WRONG RESULT: it reads, with other values than the original's")


def tiny_experiment() -> Experiment:
    """Three thousand parameters, all parts of a training."""
    return EXPERIMENTS["faces"].override(
        {"timesteps_diff": 30, "precision": "float32"},
        {"image_size": 4, "lowest_resolution_size": 4, "dim_multiply": (1,), "transformer_layers": (), "base_dim": 4,
         "norm_groups": 1},
    )  # fmt: skip


def training_parts(seed: int = 0) -> tuple:
    """Model, its average, Adam and a gradient scaler, as train.py makes them."""
    torch.manual_seed(seed)
    model = UNet(**vars(tiny_experiment().model))
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    return model, copy.deepcopy(model), torch.optim.Adam(model.parameters(), lr=1e-3, fused=True), scaler


def states(model, ema_model, optimizer, scaler) -> list:
    return [dict(model.state_dict()), dict(ema_model.state_dict()), optimizer.state_dict(), scaler.state_dict()]


@functools.cache
def checkpoint_parts(seed: int) -> dict:
    """A training's parts after a step, as `save_checkpoint` takes them."""
    parts = training_parts(seed)
    for parameter in parts[0].parameters():
        parameter.grad = torch.randn_like(parameter)
    parts[2].step()
    model, ema, optimizer, scaler = states(*parts)
    how = arithmetic(torch.device("cpu"), torch.float32, torch.channels_last, 1, 8)
    run = {"experiment": "faces", "total_steps": 90, "step": 5, "train_ids_hash": "0123456789abcdef",
           "window": {"loss_sum": 12.5, "steps": 3}, "bad_numbers": BadNumbers(torch.device("cpu")).state(),
           "arithmetic": how}  # fmt: skip
    return dict(config=tiny_experiment().to_dict(), run=run, model=model, ema=ema, optimizer=optimizer, scaler=scaler)


class Checkpoints:
    """Files of torch.save, read for sampling and for resuming."""

    name, errors = "checkpoint", (CheckpointError, ConfigError)

    def __init__(self, folder: Path):
        self.whole, self.results = [], []
        for seed in (0, 1):
            save_checkpoint(folder / "a.pt", **checkpoint_parts(seed))
            self.whole.append((folder / "a.pt").read_bytes())
            self.results.append(self.read(Case(folder / "a.pt")))

    def make(self, folder: Path, rng: random.Random) -> Case:
        case = Case(folder / "step-00000005.pt")
        whole, other = self.whole
        how = rng.random()
        if how < 0.6:
            case.path.write_bytes(damage(whole, other, rng))
        elif how < 0.75:  # a pickle that is spoilt, with the right checksum
            case.on_purpose = True
            change = lambda info, data: damage(data, data, rng) if info.filename.endswith("data.pkl") else data
            case.path.write_bytes(rezip(whole, change))
        elif how < 0.8:  # an archive like no checkpoint's
            case.on_purpose = True
            case.path.write_bytes(rezip(whole, lambda info, data: self.odd_member(info, data, rng)))
        else:
            case.on_purpose = True
            parts = copy.deepcopy(checkpoint_parts(0))
            for _ in range(rng.choice((1, 1, 2))):
                spoil_tree(parts, rng, tensors=True)
            torch.save({"format": "ddpm-faces checkpoint 1", **parts}, case.path)
        return case

    @staticmethod
    def odd_member(info, data: bytes, rng: random.Random) -> bytes:
        if rng.random() < 0.02:
            info.compress_type = 8
            data = rng.choice((data, bytes(10**6), b""))
        return data if rng.random() > 0.01 else damage(data, data, rng)

    def read(self, case: Case) -> list:
        saved = load_weights(case.path)
        denoiser = rebuild(UNet, saved, CPU)
        Experiment.from_dict(saved.config)
        parts = training_parts()
        before = copy.deepcopy(states(*parts))
        try:
            step = restore(load_checkpoint(case.path), case.path, *parts)
        except CheckpointError:
            if not same(states(*parts), before):
                raise Fault("a half-restored training") from None
            raise
        for state in states(*parts):
            for value in state.values():
                if isinstance(value, torch.Tensor) and not value.isfinite().all():
                    raise Fault("weights that are not finite were taken")
        return [
            saved.config,
            saved.run,
            dict(denoiser.network.state_dict()),
            denoiser.scheduler.betas,
            states(*parts),
            step,
        ]

    def judge(self, case: Case, result: list) -> str:
        return judge_same(self.results, case, result)


class Exported:
    """Weights in .safetensors."""

    name, errors = "exported", (CheckpointError,)

    def __init__(self, folder: Path):
        self.whole, self.results = [], []
        for seed in (0, 1):
            parts = checkpoint_parts(seed)
            run = {**parts["run"], "weights": "EMA"}
            export_weights(folder / "a.safetensors", parts["ema"], parts["config"], run)
            self.whole.append((folder / "a.safetensors").read_bytes())
            self.results.append(self.read(Case(folder / "a.safetensors")))

    def make(self, folder: Path, rng: random.Random) -> Case:
        case = Case(folder / "faces.safetensors")
        whole, other = self.whole
        how = rng.random()
        if how < 0.5:
            case.path.write_bytes(damage(whole, other, rng))
        elif how < 0.8:  # another header, and its right length
            size = int.from_bytes(whole[:8], "little")
            if how < 0.65:
                header = damage(whole[8 : 8 + size], other[8 : 8 + size], rng)
            else:
                tree = json.loads(whole[8 : 8 + size])
                spoil_tree(tree, rng, tensors=False)
                header = json.dumps(tree).encode()
            case.path.write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + size :])
        else:  # all sound but what it says
            case.on_purpose = True
            parts = copy.deepcopy(checkpoint_parts(0))
            tree = {"config": parts["config"], "run": {**parts["run"], "weights": "EMA"}, "ema": parts["ema"]}
            key = rng.choice(("config", "run", "ema"))
            spoil_tree(tree[key], rng, tensors=False)
            tensors = {str(name): t for name, t in tree["ema"].items() if isinstance(t, torch.Tensor)}
            weights = {name: tensor.clone() for name, tensor in tensors.items()}
            export_weights(case.path, weights, tree["config"], tree["run"])
        return case

    def read(self, case: Case) -> list:
        saved = load_weights(case.path)
        denoiser = rebuild(UNet, saved, CPU)
        return [saved.config, saved.run, dict(denoiser.network.state_dict()), denoiser.scheduler.betas]

    def judge(self, case: Case, result: list) -> str:
        return judge_same(self.results, case, result)
