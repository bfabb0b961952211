"""A run that is stopped, killed or damaged goes on as if nothing had happened, or says why not."""

import os
import shutil
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from io import BytesIO, StringIO, TextIOWrapper
from itertools import count
from pathlib import Path
from unittest import mock

import pytest
import torch

import sample
import train
from functions.saved import run_folder
from functions.saved.checkpoint import Checkpoint
from functions.support.errors import CheckpointError
from functions.support.random_numbers import seed_of
from functions.training.resuming import StopSignals
from functions.training.run import TrainingRun
from tests.conftest import (
    TINY,
    call,
    during,
    newest,
    only_in,
    posix,
    refused,
    terminate,
    train_tiny,
    words,
)
from tests.forked import Program, train_script
from tests.kill import assert_same_run, kill_and_resume

# All that a step may depend on is on: passes, dropout, rotation, moments, averages, labels.
EVERYTHING = """
    --diffusion.batch-size 4
    --diffusion.gradient-accumulation 2
    --model.dropout 0.1
    --diffusion.max-rotation 3
    --diffusion.labels true
    --diffusion.snapshot-every 4
"""


@pytest.fixture(scope="module")
def straight(labelled_pictures, tmp_path_factory):
    """Return a run of 10 steps with EVERYTHING, which nothing has interrupted."""
    seeds = []
    original = train.denoising_loss

    def noting_seeds(*args):
        seeds.append(torch.initial_seed())
        return original(*args)

    with mock.patch.object(train, "denoising_loss", noting_seeds):
        run = train_tiny(labelled_pictures, tmp_path_factory.mktemp("straight"), EVERYTHING)
    # The seed of a pass's dropout follows from the place of its first image in the whole run.
    assert seeds == [seed_of(0, "dropout", place) for place in range(0, 80, 4)]
    return run


def train_until_a_write_kills():
    """Kill the process when the last checkpoint is written, but has not its name yet."""
    replace = os.replace

    def replace_or_die(source, target):
        if target.match("checkpoints/step-00000010.safetensors"):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = replace_or_die
    train.main()


def by_a_kill_in_a_write(flags, runs):
    program = Program(runs.with_name("printed"), *flags, act=train_until_a_write_kills)
    assert program.wait() == -signal.SIGKILL
    (leftover,) = runs.glob("*/checkpoints/.*.tmp")
    call(train, "faces --resume --runs", runs)
    assert not leftover.exists()


def by_signals(flags, runs):
    """In the last grid it changes nothing: the run ends anyway."""
    for name, step, number, *place in (
        # Of the third step it comes between its two passes.
        ("SIGUSR1", 3, 6, "denoising_loss"),
        ("SIGINT", 5, 1, "sample_grid"),
        ("SIGTERM", 7, 2, "update_ema"),
    ):
        # The bar is on the same terminal.
        printed = StringIO()
        with (
            redirect_stdout(printed),
            redirect_stderr(printed),
            pytest.raises(SystemExit, match="75"),
            during(number, partial(signal.raise_signal, getattr(signal, name)), *place),
        ):
            call(train, *flags)
        run = only_in(runs)
        assert newest(run)["run"]["step"] == step
        advice = f"saved; continue with: python train.py --resume '{run}'"
        assert f"\nstopped by {name}, {advice}" in printed.getvalue()
        flags = ["--resume", run]
    with during(1, terminate, "sample_grid"):
        call(train, *flags)


def by_damage_and_an_update(flags, runs):
    """A flipped bit is passed over loudly in training and sampling, but not where it is named."""
    with pytest.raises(SystemExit, match="75"), during(7, terminate):
        call(train, *flags)
    _, last = map(Checkpoint, run_folder.checkpoints_of(only_in(runs)))
    spoilt = bytearray(last.path.read_bytes())
    # The EMA weights are in the first quarter.
    spoilt[len(spoilt) // 8] ^= 8
    last.path.write_bytes(spoilt)

    warning = f"WARNING: UNUSABLE CHECKPOINT: {last.path}"
    printed = StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        call(sample, only_in(runs), "--n 1 --steps 1")
        assert warning in printed.getvalue()
        assert "after 5 of 10 steps" in printed.getvalue()
        with refused(last.path.name, CheckpointError):
            call(sample, last.path, "--n 1 --steps 1")
        printed.truncate(0)
        call(train, "faces --resume auto --runs", runs)
    assert warning in printed.getvalue()


@pytest.mark.slow
@posix
@pytest.mark.parametrize("interrupted", [by_a_kill_in_a_write, by_signals, by_damage_and_an_update])
def test_resumed_equals_uninterrupted(interrupted, straight, labelled_pictures, tmp_path):
    """Bit for bit, with EVERYTHING. tests/test_own_parts.py has a network of one's own.

    tests/functions/training/test_resuming.py has a changed rate.
    """
    runs = tmp_path / "my runs"
    data = ["--diffusion.dataset-name", labelled_pictures]
    interrupted(["faces --runs", runs, *data, TINY, EVERYTHING], runs)
    snapshots = run_folder.checkpoints_of(straight, "snapshots")
    assert [run_folder.step_of(path) for path in snapshots] == [4, 8, 10]
    assert_same_run(straight, only_in(runs))


@pytest.mark.slow
@posix
def test_killed_at_random_moments(tmp_path):
    print(kill_and_resume(tmp_path, times=5))


@posix
def test_a_hangup_stops_a_run_unless_it_was_started_by_nohup():
    for inherited, received in ((signal.SIG_DFL, "SIGHUP"), (signal.SIG_IGN, None)):
        before = signal.signal(signal.SIGHUP, inherited)
        with StopSignals() as signals:
            signal.raise_signal(signal.SIGHUP)
        assert signal.signal(signal.SIGHUP, before) == inherited
        assert signals.received == received


def train_with_output():
    """Train with the terminal at the path OUTPUT, as a shell would start it."""
    path = Path(os.environ["OUTPUT"])
    # The first process of a session that opens a terminal to read hears when it is closed. Whoever
    # started the tests by nohup has let them ignore it.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.setsid()
    os.open(path, os.O_RDWR)
    with open(path, "w") as sys.stdout, redirect_stderr(sys.stdout):
        train_script()


@pytest.mark.slow
@posix
def test_a_run_whose_terminal_is_closed_saves_and_exits_with_75(pictures, tmp_path):
    """It has 1000 steps, and the terminal closes as soon as the first one begins."""
    runs = tmp_path / "runs"
    flags = ["faces", TINY, "--diffusion.epochs 200 --runs", runs]
    flags += ["--diffusion.dataset-name", pictures]
    reader, terminal = os.openpty()
    path = os.ttyname(terminal)
    program = Program(tmp_path / "printed", *flags, act=train_with_output, OUTPUT=path)
    with open(reader) as lines:
        assert any("goes to" in line for line in lines)
    os.close(terminal)

    assert program.wait() == 75
    assert 0 < newest(only_in(runs))["run"]["step"] < 1000


def test_a_script_runs_without_stderr_and_where_a_name_cannot_be_printed(
    pictures, tmp_path, monkeypatch
):
    """That is, after `2>&-`, and with PYTHONIOENCODING=cp1252 and a folder called in Japanese."""
    shutil.copytree(pictures, tmp_path / "顔")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", words("train.py --diffusion.dataset-name 顔", TINY))
    stdout = TextIOWrapper(BytesIO(), "cp1252")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        patch.setattr(sys, "stderr", None)
        train_script()
    stdout.flush()
    printed = stdout.buffer.getvalue().decode("cp1252")
    assert r"\u9854: 50 images" in printed
    assert "finished: " in printed


def stopped_by_three_signals():
    with StopSignals():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        print("one")
        signal.raise_signal(signal.SIGTERM)
        print("two")


@pytest.mark.slow
@posix
def test_a_second_signal_of_a_kind_does_what_it_always_does(tmp_path):
    """torchrun sends SIGTERM when it gets SIGINT, which the whole terminal gets: that is one."""
    program = Program(tmp_path / "printed", act=stopped_by_three_signals)

    assert program.wait() == -signal.SIGTERM
    assert program.printed == "one\n"


def test_a_checkpoint_by_time_is_never_ahead_of_the_metrics(trained, monkeypatch):
    """The clock moves a minute each time it is read, so one is due in two steps of five.

    A power cut after it must not leave a gap in metrics.csv.
    """
    clock = mock.Mock(monotonic=count(0, 60).__next__)
    monkeypatch.setattr("train.time", clock)
    calls = []
    for owner, name in ((os, "fsync"), (TrainingRun, "save")):
        original = getattr(owner, name)

        def noting(*arguments, name=name, original=original):
            calls.append(name)
            return original(*arguments)

        monkeypatch.setattr(owner, name, noting)
    run = trained(
        "--diffusion.checkpoint-every 9 --diffusion.checkpoint-minutes 3",
        "--diffusion.keep-checkpoints 1 --diffusion.log-every 1 --diffusion.epochs 1",
    )

    assert [run_folder.step_of(path) for path in run_folder.checkpoints_of(run)] == [5]
    # Metrics are flushed, then the checkpoint and its folder.
    assert " ".join(calls).count("fsync save fsync fsync") == 2
