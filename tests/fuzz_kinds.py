"""Checkpoints for tests/fuzz.py, and what all kinds share.

A kind knows what is whole, makes a case of it, reads that as the program would, and judges what came out.
"""

import copy
import functools
import json
import random
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from config import EXPERIMENTS, ConfigError, Experiment
from functions.sampling.generation import rebuild
from functions.support.checkpoint import TrainingState, check_whole, load_weights
from functions.support.device import arithmetic, choose_precision
from functions.support.errors import UserError
from functions.support.files import write_tensors
from functions.training.bad_numbers import BadNumbers
from functions.training.book_keeping import BookKeeper
from functions.training.metrics import TrainingWindow
from models.unet import UNet
from tests.fuzz_mutations import contents_text, damage, header_of, spoil_tree, with_contents, with_header

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


def training_state(seed: int = 0) -> TrainingState:
    """Model, its average, Adam and a gradient scaler, as train.py makes them."""
    torch.manual_seed(seed)
    model = UNet(**vars(tiny_experiment().model)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    return TrainingState(model, copy.deepcopy(model), optimizer, torch.amp.GradScaler("cpu", enabled=True))


def snapshot(state: TrainingState) -> list:
    """All that `TrainingState.load` could change, copied."""
    parts = (state.model, state.ema_model, state.optimizer, state.scaler)
    return copy.deepcopy([dict(part.state_dict()) for part in parts])


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


class Checkpoints:
    """Read for sampling and for resuming."""

    name, errors = "checkpoint", (UserError, ConfigError)

    def __init__(self, folder: Path):
        self.whole, self.results = [], []
        for seed in (0, 1):
            write_tensors(folder / "a.safetensors", *checkpoint_parts(seed))
            self.whole.append((folder / "a.safetensors").read_bytes())
            self.results.append(self.read(Case(folder / "a.safetensors")))

    def make(self, folder: Path, rng: random.Random) -> Case:
        how, (whole, other) = rng.random(), self.whole
        case = Case(folder / "step-00000005.safetensors", on_purpose=how > 0.65)
        if how < 0.4:
            case.path.write_bytes(damage(whole, other, rng))
        elif how < 0.5:
            case.path.write_bytes(with_header(whole, damage(header_of(whole), header_of(other), rng)))
        elif how < 0.65:  # JSON that lies
            tree = json.loads(header_of(whole))
            spoil_tree(tree, rng)
            case.path.write_bytes(with_header(whole, tree))
        elif how < 0.7:
            text = damage(contents_text(whole).encode(), contents_text(other).encode(), rng)
            case.path.write_bytes(with_contents(whole, text.decode(errors="replace")))
        elif how < 0.85:
            tree = json.loads(contents_text(whole))
            for _ in range(rng.choice((1, 1, 2))):
                spoil_tree(tree, rng)
            case.path.write_bytes(with_contents(whole, tree))
        else:  # numbers that cannot be, with the right checksums
            tensors, contents = checkpoint_parts()
            for _ in range(rng.choice((1, 1, 2))):
                self.spoil_tensor(tensors, rng)
            write_tensors(case.path, tensors, contents)
        return case

    @staticmethod
    def spoil_tensor(tensors: dict[str, Tensor], rng: random.Random) -> None:
        name = rng.choice(sorted(tensors))
        t = tensors.pop(name)
        odd = (t * float("nan"), t - float("inf"), -t, t * 1e30, t.double(), t.bfloat16(), t.long(), t[None],
               t.flatten(), t.flatten()[:0], torch.zeros(()), torch.zeros(0), t.reshape([1] * 100 + [-1]))  # fmt: skip
        action = rng.choice(("change", "change", "rename", "remove"))
        if action == "change":
            tensors[name] = rng.choice(odd)
        elif action == "rename":
            tensors[rng.choice(("", "ema.", "odd", f"{name}x", name[1:], "\x00\n\u202e", "y" * 10_000))] = t

    def read(self, case: Case) -> list:
        saved = load_weights(case.path)
        denoiser = rebuild(UNet, saved, CPU)
        Experiment.from_dict(saved.config)
        file, state = check_whole(case.path), training_state()
        choose_precision("float32", CPU, file.contents["run"].get("precision"))
        before, counters = snapshot(state), {"window": TrainingWindow(CPU, 8), "bad_numbers": BadNumbers(CPU)}
        try:
            state.load(file)
        except BaseException as error:
            if not same(snapshot(state), before):
                raise Fault("a half-restored training") from error
            raise
        books = SimpleNamespace(**counters, run=SimpleNamespace(checkpoint=file))
        BookKeeper.load(books, file.contents["run"])
        if not all(tensor.isfinite().all() for tensor in state.tensors().values()):
            raise Fault("weights that are not finite were taken")
        weights = {name: tensor.contiguous() for name, tensor in denoiser.network.state_dict().items()}
        kept = {name: counter.state() for name, counter in counters.items()}
        return [file.contents, saved.digest, weights, denoiser.scheduler.betas, snapshot(state), kept]

    def judge(self, case: Case, result: list) -> str:
        return judge_same(self.results, case, result)
