"""Losses and gradients that are not finite numbers reach neither weights, nor moments, nor the average."""

import math

import pytest
import torch

import train
from functions.support import run_folder
from functions.support.checkpoint import MOMENTS
from functions.support.errors import UserError
from functions.training.bad_numbers import BadNumbers
from functions.training.metrics import read_metrics
from tests.conftest import TINY, call, load_checkpoint, newest
from tests.kill import assert_equal

CPU = torch.device("cpu")
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)
FLAGS = ["faces", *TINY, "--diffusion.checkpoint-every", 1, "--diffusion.keep-checkpoints", 100,
         "--diffusion.log-every", 1, "--diffusion.ema-decay", 0.5]  # fmt: skip


def poison(monkeypatch, steps, how):
    """Spoil the loss of some steps, counted from 1."""
    calls, original = [], train.noise_prediction_loss

    def spoiled(*args):
        calls.append(1)
        losses = original(*args)
        return how(losses) if len(calls) in steps else losses

    monkeypatch.setattr(train, "noise_prediction_loss", spoiled)


class InfiniteGradient(torch.autograd.Function):
    """The identity, whose gradient is infinite: the loss looks well."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.inf


@pytest.mark.parametrize(
    "how",
    [lambda losses: losses * math.nan, lambda losses: losses + math.inf, InfiniteGradient.apply],
    ids=["loss nan", "loss inf", "gradient inf"],
)
def test_a_bad_step_changes_nothing_and_the_next_goes_on(how, pictures, tmp_path, monkeypatch):
    """Step 4 is bad: its checkpoint holds step 3's weights and moments; step 5 is what it is from there, unspoiled."""
    poison(monkeypatch, {4}, how)
    call(train.main, *FLAGS, "--runs", tmp_path, "--diffusion.dataset-name", pictures)
    run = next(tmp_path.iterdir())
    before, after, following = (
        load_checkpoint(run / "checkpoints" / f"step-{step:08d}.safetensors") for step in (3, 4, 5)
    )
    for part in ("model", *MOMENTS):
        assert_equal(before[part], after[part])
    assert any(not torch.equal(following["model"][name], after["model"][name]) for name in after["model"])
    assert {step.item() for step in following["step"].values()} == {4}  # one less than 5
    last = newest(run)
    assert all(tensor.isfinite().all() for tensor in last["ema"].values())
    rows = read_metrics(run / "metrics.csv")
    assert [row["skipped_steps"] for row in rows] == [0, 0, 0, 1, 1, 1, 1, 1, 1, 1]
    assert [row["step"] for row in rows if math.isnan(row["loss"])] == [4]

    monkeypatch.undo()  # from the checkpoint of the bad step the same run goes on by itself, its draws not repeated
    for path in run_folder.checkpoints_of(run)[4:]:
        path.unlink()
    call(train.main, "--resume", run)
    assert_equal(load_checkpoint(run / "checkpoints" / "step-00000005.safetensors"), following)


def test_many_bad_steps_in_a_row_end_the_run_with_all_that_helps(pictures, tmp_path, monkeypatch):
    poison(monkeypatch, {2, 4, 5, 6}, lambda losses: losses * math.nan)
    with pytest.raises(UserError) as error:
        call(train.main, *FLAGS, "--runs", tmp_path, "--diffusion.dataset-name", pictures,
             "--diffusion.max-skipped-steps", 3)  # fmt: skip
    message = str(error.value)
    last = next(tmp_path.iterdir()) / "checkpoints" / "step-00000005.safetensors"  # step 6 was not saved
    for part in ("3 steps in a row", "the last was step 6", "loss nan", "gradient norm nan", "learning rate 0.00",
                 f"Last good checkpoint: {last}"):  # fmt: skip
        assert part in message
    assert load_checkpoint(last)["run"]["bad_numbers"]["in_a_row"] == 2


def test_a_run_that_explodes_stops_by_itself_and_its_checkpoints_are_finite(pictures, tmp_path):
    with pytest.raises(UserError, match=r"2[01] steps in a row had a loss or gradients .* Lower the learning rate"):
        call(train.main, "faces", "--runs", tmp_path, "--diffusion.dataset-name", pictures, *TINY,
             "--diffusion.learning-rate", "1", "--diffusion.clip-grad-norm", "0", "--diffusion.precision", "bfloat16",
             "--diffusion.epochs", "200", "--model.base-dim", "32")  # fmt: skip
    saved = [load_checkpoint(path) for path in run_folder.checkpoints_of(next(tmp_path.iterdir()))]
    assert saved
    assert all(tensor.isfinite().all() for checkpoint in saved for tensor in checkpoint["model"].values())


def test_the_host_looks_only_when_it_reads(tmp_path):
    """Counting uses device tensors alone: on a device without values (meta), asking for one would raise."""
    watch = BadNumbers(torch.device("meta"))
    for _ in range(3):
        assert watch.check(torch.zeros((), device="meta"), torch.zeros((), device="meta")).is_meta
    with pytest.raises(RuntimeError):
        watch.read(1, 0.1, NO_SCALER, tmp_path)


def test_counting(tmp_path):
    watch = BadNumbers(CPU)
    sequence = [1.0, math.nan, math.inf, 2.0, -math.inf, 3.0]
    assert [watch.check(torch.tensor(x), torch.tensor(1.0)).item() for x in sequence] == [0, 1, 1, 0, 1, 0]
    assert watch.read(3, 0.1, NO_SCALER, tmp_path) == 3  # two in a row at most
    assert watch.check(torch.tensor(1.0), torch.tensor(math.nan)) == 1
    resumed, other = BadNumbers(CPU), BadNumbers(CPU)
    resumed.load(watch.state())
    other.load(watch.state())
    with pytest.raises(UserError, match=r"the last was step 7 \(loss 1, gradient norm nan"):
        other.read(1, 0.1, NO_SCALER, tmp_path)
    resumed.check(torch.tensor(math.nan), torch.tensor(1.0))
    with pytest.raises(
        UserError, match=r"2 steps in a row .* was step 8 \(loss nan, gradient norm 1, learning rate 0.1\)"
    ):
        resumed.read(2, 0.1, NO_SCALER, tmp_path)


def test_float16_with_a_loss_scale_trains_and_its_collapse_ends_the_run(pictures, tmp_path, monkeypatch):
    """float16 is for CUDA; here the CPU is made to run it, so that the scaler is really used.

    With a scale that overflows at first, steps are skipped until it fits; a loss that always overflows ends the run.
    """
    monkeypatch.setattr(train, "choose_precision", lambda *a: torch.float16)
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device, 2.0**30, enabled=enabled))
    flags = ["faces", *TINY, "--diffusion.dataset-name", pictures, "--diffusion.epochs", 20]
    call(train.main, *flags, "--runs", tmp_path / "a")
    run = next((tmp_path / "a").iterdir())
    rows = read_metrics(run / "metrics.csv")
    assert 0 < rows[-1]["skipped_steps"] < 20
    saved = newest(run)
    assert saved["scaler"]["scale"] == 2.0 ** (30 - rows[-1]["skipped_steps"])
    assert rows[-1]["val_loss"] < 0.5

    poison(monkeypatch, range(8, 100, 2), InfiniteGradient.apply)  # every other step: never many in a row
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device, 4.0, enabled=enabled))
    with pytest.raises(UserError, match=r"loss scale of float16 has collapsed to 0\.5: .* bfloat16"):
        call(train.main, *flags, "--runs", tmp_path / "b")
