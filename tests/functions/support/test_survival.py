"""A run that is stopped, killed, damaged or out of space goes on as if nothing had happened, or says why it cannot."""

import json
import os
import signal
import subprocess
import sys

import pytest

import sample
import train
from functions.support import run_folder
from functions.support.errors import CheckpointError, UserError
from functions.training.metrics import read_metrics
from tests.conftest import ROOT, TINY, call, during, interrupt, newest, posix, script
from tests.kill import assert_same_run, kill_and_resume


@pytest.mark.parametrize("during_pass", [13, 14], ids=["first pass of a step", "second pass"])
def test_a_step_cut_short_in_its_accumulation_is_done_again(during_pass, pictures, tmp_path):
    """Two passes a step, dropout and augmentation on; cut in step 7, in the second epoch, after the checkpoint of 5."""
    flags = ["faces", "--diffusion.dataset-name", pictures, *TINY, "--diffusion.batch-size", 4, "--model.dropout", 0.1,
             "--diffusion.gradient-accumulation", 2, "--diffusion.max-rotation", 3]  # fmt: skip
    call(train.main, *flags, "--runs", tmp_path / "straight")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        during(patch, during_pass, interrupt, "noise_prediction_loss")
        call(train.main, *flags, "--runs", tmp_path / "cut")
    call(train.main, "faces", "--resume", "--runs", tmp_path / "cut")
    assert_same_run(*(tmp_path / "straight").iterdir(), *(tmp_path / "cut").iterdir())


@posix
def test_killed_at_random_moments(tmp_path):
    print(kill_and_resume(tmp_path, times=3))


@posix
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_finishes_the_step_saves_and_exits_with_75(name, tiny_run, pictures, tmp_path, capsys):
    """The signal comes in the middle of step 7; the run stops after it and then goes on as if never stopped."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        during(patch, 7, lambda: signal.raise_signal(getattr(signal, name)))
        call(train.main, "faces", "--runs", tmp_path, "--diffusion.dataset-name", pictures, *TINY)
    assert stop.value.code == 75
    assert signal.getsignal(signal.SIGTERM) == before
    run = next(tmp_path.iterdir())
    assert newest(run)["run"]["step"] == 7
    assert f"stopped by {name}, saved; go on with: python train.py --resume {run}" in capsys.readouterr().out
    call(train.main, "--resume", run)
    assert_same_run(tiny_run, run)


@posix
def test_a_second_signal_ends_the_process_at_once():
    """At once means a second later: a scheduler's signal to all, and torchrun's for the same reason, are one."""
    code = """
import signal, time
from functions.training.stopping import StopSignals
with StopSignals():
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    print("one", flush=True)
    time.sleep(1.1)
    signal.raise_signal(signal.SIGINT)
    print("two")
"""
    result = script("-c", code)
    assert result.returncode == 130
    assert result.stdout == "one\n"


@posix
def test_resume_auto_goes_on_or_starts_loudly(unfinished, tiny_run, tmp_path, capsys):
    call(train.main, "faces", "--resume", "auto", "--runs", unfinished.parent)
    assert list(unfinished.parent.iterdir()) == [unfinished]
    assert_same_run(tiny_run, unfinished)
    flags = ["--diffusion.dataset-name", newest(unfinished)["config"]["diffusion"]["dataset_name"], *TINY]
    capsys.readouterr()
    call(train.main, "faces", "--resume", "auto", "--runs", unfinished.parent, *flags)  # a finished run is no reason
    assert "WARNING: NOTHING TO RESUME" in capsys.readouterr().err
    assert len(list(unfinished.parent.iterdir())) == 2
    with pytest.raises(UserError, match="no unfinished run"):
        call(train.main, "faces", "--resume", "--runs", unfinished.parent)


@posix
@pytest.mark.parametrize("damage", ["truncated", "empty", "one bit"])
def test_a_damaged_newest_checkpoint_is_passed_over_loudly(damage, unfinished, tiny_run, capsys):
    path = run_folder.checkpoints_of(unfinished)[-1]
    content = bytearray(path.read_bytes())
    if damage == "one bit":
        content[len(content) // 2] ^= 8
    path.write_bytes(content[: {"truncated": len(content) // 3, "empty": 0}.get(damage, len(content))])
    capsys.readouterr()
    call(sample.main, unfinished, "--n", 1, "--steps", 1)
    printed = capsys.readouterr()
    assert f"WARNING: DAMAGED CHECKPOINT: {path}" in printed.err
    assert "after 5 of 10 steps" in printed.out
    with pytest.raises(CheckpointError, match=path.name):  # named itself, it is not exchanged for another
        call(sample.main, path, "--n", 1, "--steps", 1)
    call(train.main, "--resume", unfinished)
    assert f"WARNING: DAMAGED CHECKPOINT: {path}" in capsys.readouterr().err
    assert_same_run(tiny_run, unfinished)


@posix
def test_a_damaged_last_checkpoint_or_config_is_no_reason_to_start_afresh(unfinished, tiny_run, pictures, capsys):
    (unfinished / "config.json").write_text("{")
    call(train.main, "faces", "--resume", "auto", "--runs", unfinished.parent)
    assert json.loads((unfinished / "config.json").read_text())["experiment"] == "faces"  # made anew
    last = run_folder.checkpoints_of(unfinished)[-1]
    assert run_folder.step_of(last) == 10
    last.write_bytes(last.read_bytes()[:-100])
    call(train.main, "faces", "--resume", "auto", "--runs", unfinished.parent)
    assert "DAMAGED CHECKPOINT" in capsys.readouterr().err
    assert list(unfinished.parent.iterdir()) == [unfinished]
    assert_same_run(tiny_run, unfinished)


@posix
def test_a_damaged_row_of_metrics_is_left_out_loudly(unfinished, capsys):
    with open(unfinished / "metrics.csv", "ab") as file:
        file.write(b"\xff\xfe,\n")
    call(train.main, "--resume", unfinished)
    assert "metrics.csv: line 6 is damaged" in capsys.readouterr().err
    assert [row["step"] for row in read_metrics(unfinished / "metrics.csv")] == [2, 4, 5, 6, 8, 10]


@posix
def test_a_grid_that_the_stop_left_no_time_for_is_drawn_on_resuming(pictures, tiny_run, tmp_path):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="75"):
        during(patch, 5, lambda: signal.raise_signal(signal.SIGTERM))  # step 5 is due for a grid
        call(train.main, "faces", "--runs", tmp_path, "--diffusion.dataset-name", pictures, *TINY)
    run = next(tmp_path.iterdir())
    assert not list((run / "samples").iterdir())
    call(train.main, "--resume", run)
    assert_same_run(tiny_run, run)


@posix
def test_no_sound_checkpoint_is_an_error_and_no_fresh_start(unfinished):
    for path in run_folder.checkpoints_of(unfinished):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="the file is empty"):
        call(train.main, "faces", "--resume", "auto", "--runs", unfinished.parent)
    assert list(unfinished.parent.iterdir()) == [unfinished]


def test_checkpoints_by_time_and_kept_for_good(pictures, tmp_path):
    """By steps none is due before the last; a time that is always over makes one after every step."""
    call(train.main, "faces", "--runs", tmp_path, "--diffusion.dataset-name", pictures, *TINY,
         "--diffusion.checkpoint-every", 1000, "--diffusion.checkpoint-minutes", 1e-9,
         "--diffusion.keep-checkpoints", 1, "--diffusion.keep-every", 4)  # fmt: skip
    saved = run_folder.checkpoints_of(next(tmp_path.iterdir()))
    assert [run_folder.step_of(path) for path in saved] == [4, 8, 10]


@posix
def test_two_trainings_in_one_folder(unfinished):
    """The second of two real processes is refused; the first is not disturbed."""
    command = [sys.executable, ROOT / "train.py", "--resume", unfinished, "--diffusion.epochs", "400"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as first:
        assert any("goes to" in line for line in first.stdout)
        refused = script("train.py", "--resume", unfinished)
        assert refused.returncode == 2
        assert f"error: {unfinished}: another process is training in this folder already\n" == refused.stderr
        first.send_signal(signal.SIGTERM)
        assert first.wait(60) == 75


def test_the_log_goes_to_the_disk_before_the_checkpoint(pictures, tmp_path, monkeypatch):
    """After a power cut a checkpoint may not be ahead of metrics.csv: that would leave a gap."""
    order = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, original=original: (order.append((name, *a)), original(*a)))
    flush = train.BookKeeper.save
    monkeypatch.setattr(train.BookKeeper, "save", lambda self, done: (order.append(("save", done)), flush(self, done)))
    call(train.main, "faces", "--runs", tmp_path, "--diffusion.dataset-name", pictures, *TINY)
    saves = [i for i, (what, *_) in enumerate(order) if what == "save"]
    assert len(saves) == 2
    for i in saves:
        what = [name for name, *_ in order[i - 1 : i + 4]]
        assert what == ["fsync", "save", "fsync", "replace", "fsync"]  # metrics; checkpoint, its name, the folder
        assert str(order[i + 2][-1]).endswith(".safetensors")
