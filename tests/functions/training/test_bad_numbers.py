"""Losses and gradients that are not finite numbers reach neither weights, nor moments, nor the average."""

import itertools
import math
from functools import partial

import pytest
import torch

import train
from functions.support import run_folder
from functions.support.checkpoint import MOMENTS
from functions.support.errors import UserError
from functions.training.bad_numbers import BadNumbers
from functions.training.metrics import read_metrics
from tests.conftest import CPU, call, load_checkpoint, newest
from tests.spoilt_files import same

NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)
FLAGS = [
    "--diffusion.checkpoint-every",
    1,
    "--diffusion.keep-checkpoints",
    100,
    "--diffusion.ema-decay",
    0.5,
    "--diffusion.log-every",
    1,
    "--diffusion.validate-every",
    99,
    "--diffusion.sample-every",
    99,
]


def not_a_number(losses):
    return losses * math.nan


def with_infinite_gradient(losses):
    """The loss looks well."""
    losses.register_hook(lambda gradient: gradient * math.inf)
    return losses


def poison(monkeypatch, spoil_of_step):
    """Spoil the loss of some steps, counted from 1."""
    calls, original, as_they_are = itertools.count(1), train.denoising_loss, lambda losses: losses
    spoiled = lambda *args: spoil_of_step.get(next(calls), as_they_are)(original(*args))
    monkeypatch.setattr(train, "denoising_loss", spoiled)


@pytest.mark.slow
def test_a_bad_step_changes_nothing_and_the_next_goes_on(trained, monkeypatch):
    """Its checkpoint holds the weights and moments of the step before; the next step goes on from there, unspoiled."""
    bad = {2: not_a_number, 4: lambda losses: losses + math.inf, 6: with_infinite_gradient}
    poison(monkeypatch, bad)
    run = trained(*FLAGS)
    checkpoint_of = lambda step: load_checkpoint(
        run / "checkpoints" / f"step-{step:08d}.safetensors"
    )
    for count, step in enumerate(bad, 1):
        before, after, following = map(checkpoint_of, (step - 1, step, step + 1))
        assert all(same(before[part], after[part]) for part in ("model", *MOMENTS))
        assert not same(following["model"], after["model"])
        assert {made.item() for made in following["step"].values()} == {step + 1 - count}
    assert all(tensor.isfinite().all() for tensor in newest(run)["ema"].values())
    rows = read_metrics(run / "metrics.csv")
    assert [row["skipped_steps"] for row in rows] == [0, 1, 1, 2, 2, 3, 3, 3, 3, 3]
    assert [row["step"] for row in rows if math.isnan(row["loss"])] == [2, 4, 6]

    # From the checkpoint of the last bad step the run goes on by itself, its draws not repeated
    monkeypatch.undo()
    for path in run_folder.checkpoints_of(run)[6:]:
        path.unlink()
    call(train.main, "--resume", run)
    assert same(checkpoint_of(7), following)


def test_many_bad_steps_in_a_row_end_the_run_with_all_that_helps(trained, tmp_path, monkeypatch):
    poison(monkeypatch, dict.fromkeys((2, 4, 5, 6), not_a_number))
    with pytest.raises(UserError) as error:
        trained(*FLAGS, "--diffusion.max-skipped-steps", 3)
    (run,) = tmp_path.iterdir()
    last = run_folder.checkpoints_of(run)[-1]
    assert run_folder.step_of(last) == 5  # step 6 was not saved
    for part in (
        "3 steps in a row",
        "the last was step 6",
        "loss nan",
        "gradient norm nan",
        "learning rate 0.00",
        f"Last good checkpoint: {last}",
    ):
        assert part in str(error.value)
    assert newest(run)["run"]["bad_numbers"]["in_a_row"] == 2


def test_counting(tmp_path):
    watch = BadNumbers(CPU)
    sequence = [1.0, math.nan, math.inf, 2.0, -math.inf, 3.0]
    assert [watch.check(torch.tensor(x), torch.tensor(1.0)).item() for x in sequence] == [
        0,
        1,
        1,
        0,
        1,
        0,
    ]
    # Two in a row at most
    assert watch.read(watch.numbers(NO_SCALER).tolist(), 3, 0.1, tmp_path) == 3
    assert watch.check(torch.tensor(1.0), torch.tensor(math.nan)) == 1
    resumed = BadNumbers(CPU)
    resumed.load(watch.state())
    resumed.check(torch.tensor(math.nan), torch.tensor(1.0))
    for watching, limit, message in (
        (watch, 1, r"the last was step 7 \(loss 1, gradient norm nan"),
        (
            resumed,
            2,
            r"2 steps in a row .* was step 8 \(loss nan, gradient norm 1, learning rate 0.1\)",
        ),
    ):
        with pytest.raises(UserError, match=message):
            watching.read(watching.numbers(NO_SCALER).tolist(), limit, 0.1, tmp_path)


@pytest.mark.slow
def test_float16_with_a_loss_scale_trains_and_its_collapse_ends_the_run(trained, monkeypatch):
    """On the CPU, to use the scaler: its scale falls until the steps fit; overflowing again and again ends the run."""
    monkeypatch.setattr(train, "choose_precision", lambda *a: torch.float16)
    scaler = torch.amp.GradScaler
    start_with = lambda scale: monkeypatch.setattr(
        torch.amp, "GradScaler", partial(scaler, init_scale=scale)
    )
    flags = [*FLAGS, "--diffusion.epochs", 5, "--diffusion.checkpoint-every", 99]
    start_with(2.0**24)
    run = trained(*flags)
    last = read_metrics(run / "metrics.csv")[-1]
    assert 0 < last["skipped_steps"] < 15
    assert newest(run)["scaler"]["scale"] == 2.0 ** (24 - last["skipped_steps"])
    assert last["val_loss"] < 0.9

    # Never two in a row
    poison(monkeypatch, dict.fromkeys(range(4, 100, 2), with_infinite_gradient))
    start_with(4.0)
    with pytest.raises(
        UserError, match=r"loss scale of float16 has collapsed to 0\.5: .* bfloat16"
    ):
        trained(*flags)
