"""Gradients that are not finite reach neither weights nor moments, and too many end the run."""

import math
from functools import partial

import pytest
import torch

import train
from functions.saved.run_folder import path_of
from functions.training.metrics import read_metrics
from tests.conftest import ONE_LEVEL, call, load_checkpoint, newest, only_in, refused
from tests.small_training import same

FLAGS = f"""
    {ONE_LEVEL}
    --diffusion.checkpoint-every 1
    --diffusion.keep-checkpoints 100
    --diffusion.ema-decay 0.25
    --diffusion.validate-every 99
    --diffusion.sample-every 0
"""


def not_a_number(losses):
    return losses * math.nan


def with_infinite_gradient(losses):
    """Spoil only the gradient: the loss itself is finite."""
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
            losses["loss"] = spoil_of_step[step](losses["loss"])
        return losses

    monkeypatch.setattr(train, "denoising_loss", spoiled)


def test_a_bad_step_changes_only_the_average(trained, monkeypatch):
    """Gradients are clipped, so Adam's first moments have a tenth of this norm after a step."""
    bad = {2: not_a_number, 4: with_infinite_gradient}
    poison(monkeypatch, bad)
    clipped = "--diffusion.clip-grad-norm 0.01 --diffusion.optimizer adam"
    run = trained(FLAGS, clipped, "--diffusion.log-every 1")
    optimizer = load_checkpoint(path_of(run, "checkpoints", 1))["optimizer"]
    moments = [tensor.norm() for name, tensor in optimizer.items() if name.startswith("exp_avg.")]
    assert torch.stack(moments).norm() == pytest.approx(0.001, rel=1e-3)

    for step in bad:
        before, after = (
            load_checkpoint(path_of(run, "checkpoints", number)) for number in (step - 1, step)
        )
        # The optimiser's part has the moments and the number of good steps.
        assert all(same(before[part], after[part]) for part in ("model", "optimizer"))
        # The ramp is at (1 + n) / (10 + n) after n = step - 1 updates.
        decay = min(0.25, step / (9 + step))
        expected = {
            name: decay * average + (1 - decay) * before["model"][name]
            for name, average in before["ema"].items()
        }
        torch.testing.assert_close(after["ema"], expected)
    rows = read_metrics(run / "metrics.csv")
    assert [row["skipped_steps"] for row in rows] == [0, 1, 1, 2, 2, 2, 2, 2, 2, 2]
    assert [row["step"] for row in rows if math.isnan(row["loss"])] == [2, 4]


def test_many_bad_steps_end_the_run_and_it_resumes_from_its_last_checkpoint(
    trained, tmp_path, monkeypatch
):
    """Rows have two steps. The bad steps are still too few at the third."""
    monkeypatch.setattr(train, "MOST_SKIPPED", 5)
    sentence = r"last 5 steps had gradients that are not .* \(learning rate 0\.00"
    with monkeypatch.context() as patch, refused(sentence) as error:
        poison(patch, dict.fromkeys(range(2, 7), not_a_number))
        trained(FLAGS)
    run = only_in(tmp_path)
    assert f"Last good checkpoint: {path_of(run, 'checkpoints', 5)}" in str(error.value)

    # A good step ends the row of skipped ones.
    call(train, "--resume", run, "--diffusion.precision bfloat16")
    rows = read_metrics(run / "metrics.csv")
    assert [row["skipped_steps"] for row in rows] == [1, 3, 4, 4, 4]
    # The last step has the index 9 of 10.
    rate = 1e-3 * (1 + math.cos(0.9 * math.pi))
    assert rows[-1]["learning_rate"] == pytest.approx(rate, rel=1e-5)


@pytest.mark.slow
def test_float16_with_a_loss_scale_trains(trained, monkeypatch):
    """The scale falls until gradients are finite. The scaler works on the CPU, too."""
    monkeypatch.setattr("functions.training.run.choose_precision", lambda *a: torch.float16)
    scaler = partial(torch.amp.GradScaler, init_scale=2.0**24)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    run = trained(ONE_LEVEL, "--diffusion.epochs 5")

    # Each skipped step halves the scale.
    last = read_metrics(run / "metrics.csv")[-1]
    assert 0 < last["skipped_steps"] < 15
    assert newest(run)["scaler"]["scale"] == 2.0 ** (24 - last["skipped_steps"])
    assert last["val_loss"] < 0.9
