"""A run that is stopped, killed or damaged goes on as if nothing had happened, or says why it cannot."""

import json
import os
import shutil
import signal
import time

import pytest

import sample
import train
from functions.support import run_folder
from functions.support.errors import CheckpointError, UserError
from functions.training.stopping import StopSignals
from tests.conftest import TINY, call, during, interrupt, newest, posix, train_tiny
from tests.forked import Program, wait_until
from tests.kill import assert_same_run, kill_and_resume


@pytest.mark.slow
def test_a_step_cut_short_in_its_accumulation_is_done_again(pictures, tmp_path):
    """Two passes a step, dropout and augmentation on; cut between those of step 7, after the checkpoint of step 5."""
    flags = [
        "--diffusion.batch-size",
        4,
        "--diffusion.gradient-accumulation",
        2,
        "--model.dropout",
        0.1,
    ]
    flags += ["--diffusion.max-rotation", 3]
    straight = train_tiny(pictures, tmp_path / "straight", *flags)
    with pytest.raises(KeyboardInterrupt), during(14, interrupt, "denoising_loss"):
        train_tiny(pictures, tmp_path / "cut", *flags)
    call(train.main, "faces", "--resume", "--runs", tmp_path / "cut")
    assert_same_run(straight, *(tmp_path / "cut").iterdir())


@pytest.mark.slow
@posix
def test_killed_at_random_moments(tmp_path):
    print(kill_and_resume(tmp_path, times=3))


def train_until_a_write_kills():
    """When the last checkpoint is written, but has not its name yet."""
    replace, last = os.replace, "step-00000010.safetensors"
    os.replace = lambda a, b: (
        os.kill(os.getpid(), signal.SIGKILL) if b.name == last else replace(a, b)
    )
    train.main()


@pytest.mark.slow
@posix
def test_killed_in_the_middle_of_a_write(tiny_run, pictures, tmp_path):
    flags = ["faces", "--runs", tmp_path / "runs", "--diffusion.dataset-name", pictures, *TINY]
    assert (
        Program(tmp_path / "printed", *flags, act=train_until_a_write_kills).wait()
        == -signal.SIGKILL
    )
    (run,) = (tmp_path / "runs").iterdir()
    (leftover,) = run.glob("checkpoints/.*.tmp")
    call(train.main, "--resume", run)
    assert not leftover.exists()
    assert_same_run(tiny_run, run)


@pytest.mark.slow
@posix
def test_signals_finish_the_step_save_and_exit_with_75(tiny_run, pictures, tmp_path, capsys):
    """Each in the middle of a step; in step 5 no time is left for the grid that is due, which is drawn on resuming."""
    arguments, done = ["faces", "--runs", tmp_path, "--diffusion.dataset-name", pictures, *TINY], 0
    before = signal.getsignal(signal.SIGTERM)
    for name, step in {"SIGUSR1": 3, "SIGINT": 5, "SIGTERM": 7}.items():
        number = getattr(signal, name)
        with (
            pytest.raises(SystemExit) as stop,
            during(step - done, lambda number=number: signal.raise_signal(number)),
        ):
            call(train.main, *arguments)
        assert stop.value.code == 75 and signal.getsignal(signal.SIGTERM) == before
        (run,) = tmp_path.iterdir()
        assert newest(run)["run"]["step"] == step and len(list(run.glob("samples/*"))) == (step > 5)
        assert (
            f"stopped by {name}, saved; go on with: python train.py --resume {run}"
            in capsys.readouterr().out
        )
        arguments, done = ["--resume", run], step
    call(train.main, *arguments)
    assert_same_run(tiny_run, run)


def stopped_by_three_signals():
    with StopSignals():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        print("one")
        time.sleep(1.1)
        signal.raise_signal(signal.SIGINT)
        print("two")


@pytest.mark.slow
@posix
def test_a_second_signal_ends_the_process_at_once(tmp_path):
    """At once means a second later: a scheduler's signal to all, and torchrun's for the same reason, are one."""
    program = Program(tmp_path / "printed", act=stopped_by_three_signals)
    assert (program.wait(), program.printed) == (130, "one\n")


def test_a_finished_run_is_nothing_to_resume(tiny_run, tmp_path, capsys):
    shutil.copytree(tiny_run, tmp_path / tiny_run.name)
    flags = [
        "--diffusion.dataset-name",
        newest(tiny_run)["config"]["diffusion"]["dataset_name"],
        *TINY,
    ]
    call(train.main, "faces", "--resume", "auto", "--dry-run", "--runs", tmp_path, *flags)
    printed = capsys.readouterr()
    assert "WARNING: NOTHING TO RESUME" in printed.err
    assert f"goes to    {tmp_path / 'faces-<time>'}" in printed.out
    with pytest.raises(UserError, match="no unfinished run"):
        call(train.main, "faces", "--resume", "--runs", tmp_path)


@pytest.mark.slow
@posix
def test_damaged_files_are_passed_over_loudly(unfinished, tiny_run, capsys):
    """The newest checkpoint, config.json and a row of metrics.csv; then the last checkpoint of the finished run."""
    path = run_folder.checkpoints_of(unfinished)[-1]
    spoilt = bytearray(path.read_bytes())
    spoilt[len(spoilt) // 2] ^= 8
    path.write_bytes(spoilt)
    (unfinished / "config.json").write_text("{")
    (unfinished / "metrics.csv").write_bytes(
        (unfinished / "metrics.csv").read_bytes() + b"\xff\xfe,\n"
    )
    capsys.readouterr()
    call(sample.main, unfinished, "--n", 1, "--steps", 1)
    printed = capsys.readouterr()
    assert f"WARNING: DAMAGED CHECKPOINT: {path}" in printed.err
    assert "after 5 of 10 steps" in printed.out
    # Named itself, it is not exchanged for another
    with pytest.raises(CheckpointError, match=path.name):
        call(sample.main, path, "--n", 1, "--steps", 1)
    call(train.main, "faces", "--resume", "auto", "--runs", unfinished.parent)
    printed = capsys.readouterr().err
    assert f"WARNING: DAMAGED CHECKPOINT: {path}" in printed
    assert "metrics.csv: line 6 is damaged" in printed
    # Made anew
    assert json.loads((unfinished / "config.json").read_text())["experiment"] == "faces"
    assert_same_run(tiny_run, unfinished)
    last = run_folder.checkpoints_of(unfinished)[-1]
    last.write_bytes(last.read_bytes()[:-100])
    call(train.main, "faces", "--resume", "auto", "--runs", unfinished.parent)
    assert f"WARNING: DAMAGED CHECKPOINT: {last}" in capsys.readouterr().err
    assert list(unfinished.parent.iterdir()) == [unfinished]
    assert_same_run(tiny_run, unfinished)


def test_no_sound_checkpoint_is_an_error_and_no_fresh_start(unfinished):
    for path in run_folder.checkpoints_of(unfinished):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="the file is empty"):
        call(train.main, "faces", "--resume", "auto", "--runs", unfinished.parent)
    assert list(unfinished.parent.iterdir()) == [unfinished]


@pytest.mark.slow
@posix
def test_two_trainings_in_one_folder(unfinished, tmp_path):
    """The second of two real processes is refused; the first is not disturbed."""
    first = Program(
        tmp_path / "first",
        "--resume",
        unfinished,
        "--diffusion.epochs",
        4000,
        "--diffusion.keep-checkpoints",
        1000,
    )
    wait_until((unfinished / "checkpoints" / "step-00000010.safetensors").exists, first.is_alive)
    second = Program(tmp_path / "second", "--resume", unfinished)
    assert second.wait() == 2
    assert second.printed.endswith(
        f"\nerror: {unfinished}: another process is training in this folder already\n"
    )
    first.terminate()
    assert first.wait() == 75, first.printed


@pytest.mark.slow
def test_a_checkpoint_by_time_has_its_metrics_and_is_on_the_disk(trained, monkeypatch):
    """A time that is always over makes one a step; none may be ahead of metrics.csv: a power cut would leave a gap."""
    order = []
    noting = lambda name, original: (
        lambda *arguments: order.append((name, *arguments)) or original(*arguments)
    )
    for owner, name in ((os, "fsync"), (os, "replace"), (train.BookKeeper, "save")):
        monkeypatch.setattr(owner, name, noting(name, getattr(owner, name)))
    run = trained(
        "--diffusion.log-every",
        1,
        "--diffusion.checkpoint-every",
        9,
        "--diffusion.checkpoint-minutes",
        1e-9,
        "--diffusion.epochs",
        1,
        "--diffusion.keep-checkpoints",
        1,
        "--diffusion.keep-every",
        2,
    )
    assert [run_folder.step_of(path) for path in run_folder.checkpoints_of(run)] == [2, 4, 5]
    saves = [i for i, (what, *_) in enumerate(order) if what == "save"]
    assert len(saves) == 5
    for i in saves:
        what = [name for name, *_ in order[i - 1 : i + 4]]
        # Metrics; checkpoint, its name, the folder
        assert what == ["fsync", "save", "fsync", "replace", "fsync"]
        assert order[i + 2][-1].suffix == ".safetensors"
