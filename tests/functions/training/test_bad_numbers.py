"""Losses and gradients that are not finite numbers reach neither weights, nor moments, nor the
average.
"""

import math
import shlex
from functools import partial

import pytest
import torch

import train
from functions.support import run_folder
from functions.support.checkpoint import MOMENTS
from functions.support.errors import UserError
from functions.training.bad_numbers import BadNumbers
from functions.training.metrics import fetch, read_metrics
from tests.conftest import CPU, call, load_checkpoint, newest
from tests.spoilt_files import same

NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)
# Each step has a row of metrics and a checkpoint, and nothing else is done beside the training.
FLAGS = shlex.split("""
    --diffusion.checkpoint-every 1
    --diffusion.keep-checkpoints 100
    --diffusion.ema-decay 0.5
    --diffusion.log-every 1
    --diffusion.validate-every 99
    --diffusion.sample-every 99
""")


def not_a_number(losses):
    return losses * math.nan


def infinite(losses):
    return losses + math.inf


def with_infinite_gradient(losses):
    """Spoil the gradient alone: the loss looks well."""
    losses.register_hook(lambda gradient: gradient * math.inf)
    return losses


def poison(monkeypatch, spoil_of_step):
    """Spoil the losses of some steps; `spoil_of_step` has a function for each, counted from 1."""
    original = train.denoising_loss
    step = 0

    def spoiled(*args):
        nonlocal step
        step += 1
        losses = original(*args)
        if step in spoil_of_step:
            losses = spoil_of_step[step](losses)
        return losses

    monkeypatch.setattr(train, "denoising_loss", spoiled)


@pytest.mark.slow
def test_a_bad_step_changes_nothing_and_the_next_goes_on(trained, monkeypatch):
    """A bad step's checkpoint holds the weights and moments of the step before.

    The next step goes on from there, unspoiled.
    """
    bad = {2: not_a_number, 4: infinite, 6: with_infinite_gradient}
    poison(monkeypatch, bad)
    run = trained(*FLAGS)

    def checkpoint_of(step):
        return load_checkpoint(run / "checkpoints" / f"step-{step:08d}.safetensors")

    for count, step in enumerate(bad, 1):
        before = checkpoint_of(step - 1)
        after = checkpoint_of(step)
        following = checkpoint_of(step + 1)
        assert all(same(before[part], after[part]) for part in ("model", *MOMENTS))
        assert not same(following["model"], after["model"])

        # Adam counts the good steps only.
        assert {made.item() for made in following["step"].values()} == {step + 1 - count}

    assert all(tensor.isfinite().all() for tensor in newest(run)["ema"].values())
    rows = read_metrics(run / "metrics.csv")
    assert [row["skipped_steps"] for row in rows] == [0, 1, 1, 2, 2, 3, 3, 3, 3, 3]

    # At step 6 the loss is a number, and only its gradient is bad.
    assert [row["step"] for row in rows if math.isnan(row["loss"])] == [2, 4, 6]

    # Resumed from the checkpoint of the last bad step, 6, the run does step 7 as before: the draws
    # of step 6 are not repeated.
    monkeypatch.undo()
    for path in run_folder.checkpoints_of(run)[6:]:
        path.unlink()
    call(train.main, "--resume", run)
    assert same(checkpoint_of(7), following)


def test_many_bad_steps_in_a_row_end_the_run_with_all_that_helps(trained, tmp_path, monkeypatch):
    poison(monkeypatch, dict.fromkeys((2, 4, 5, 6), not_a_number))
    with pytest.raises(UserError) as error:
        trained(*FLAGS, "--diffusion.max-skipped-steps", 3)

    # The third bad step in a row, 6, is not saved.
    (run,) = tmp_path.iterdir()
    last = run_folder.checkpoints_of(run)[-1]
    assert run_folder.step_of(last) == 5
    for part in (
        "3 steps in a row",
        "The last bad step was 6",
        "loss nan",
        "gradient norm nan",
        "learning rate 0.00",
        f"Last good checkpoint: {last}",
    ):
        assert part in str(error.value)
    assert newest(run)["run"]["bad_numbers"]["in_a_row"] == 2


def test_counting(tmp_path):
    watch = BadNumbers(CPU)

    def check(loss, grad_norm):
        return watch.check(torch.tensor(loss), torch.tensor(grad_norm))

    # A step is bad (1) where its loss is not finite.
    assert check(1.0, 1.0) == 0
    assert check(math.nan, 1.0) == 1
    assert check(math.inf, 1.0) == 1
    assert check(2.0, 1.0) == 0
    assert check(-math.inf, 1.0) == 1
    assert check(3.0, 1.0) == 0

    # A limit of 3 in a row is not reached: there were two at most, and three in all.
    assert watch.check_counts(fetch(watch.counts(NO_SCALER)), 3, 0.1, tmp_path) == 3

    # The seventh step is bad by its gradient, and the eighth comes after a resumption.
    assert check(1.0, math.nan) == 1
    resumed = BadNumbers(CPU)
    resumed.load(watch.state())
    resumed.check(torch.tensor(math.nan), torch.tensor(1.0))

    message = r"The last bad step was 7 \(loss 1, gradient norm nan"
    with pytest.raises(UserError, match=message):
        watch.check_counts(fetch(watch.counts(NO_SCALER)), 1, 0.1, tmp_path)
    message = r"2 steps in a row .* bad step was 8 \(loss nan, gradient norm 1, learning rate 0.1\)"
    with pytest.raises(UserError, match=message):
        resumed.check_counts(fetch(resumed.counts(NO_SCALER)), 2, 0.1, tmp_path)


@pytest.mark.slow
def test_float16_with_a_loss_scale_trains_and_its_collapse_ends_the_run(trained, monkeypatch):
    """The scale falls until the steps fit; where they overflow again and again, the run ends.

    This is float16 on the CPU, whose training uses the scaler, too.
    """
    monkeypatch.setattr(train, "choose_precision", lambda *a: torch.float16)
    scaler = torch.amp.GradScaler

    def start_with(scale):
        monkeypatch.setattr(torch.amp, "GradScaler", partial(scaler, init_scale=scale))

    flags = [*FLAGS, "--diffusion.epochs", 5, "--diffusion.checkpoint-every", 99]
    start_with(2.0**24)
    run = trained(*flags)

    # Each skipped step halves the scale.
    last = read_metrics(run / "metrics.csv")[-1]
    assert 0 < last["skipped_steps"] < 15
    assert newest(run)["scaler"]["scale"] == 2.0 ** (24 - last["skipped_steps"])
    assert last["val_loss"] < 0.9

    # Every other step overflows: never two in a row, so it is the scale that ends the run.
    poison(monkeypatch, dict.fromkeys(range(4, 100, 2), with_infinite_gradient))
    start_with(4.0)
    message = r"loss scale of float16 has collapsed to 0\.5: .* bfloat16"
    with pytest.raises(UserError, match=message):
        trained(*flags)
