"""Several processes train as one does, and none outlives the others."""

import os
import re
import secrets
import signal
import socket
from contextlib import suppress

import pytest
import torch
from torch.distributed.run import main as torchrun_program

import train
from functions.training.metrics import read_metrics
from tests.conftest import ROOT, TINY, call, newest, only_in
from tests.forked import Program, train_script, wait_until
from tests.functions.training.test_bad_numbers import not_a_number, poison
from tests.kill import sample_grids

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="torchrun with gloo")]
# The effective batch is 9 images in passes of 3. One process has passes of 3, 3 and 3; of two, the
# first has 3 and 1, the second 3 and 2.
FLAGS = f"""
    {TINY}
    --diffusion.objective v
    --diffusion.labels true
    --diffusion.batch-size 3
    --diffusion.gradient-accumulation 3
    --diffusion.validation-samples 20
"""


def free_port():
    """Return a port of 127.0.0.1 at which processes can meet.

    It is below the ports of outgoing connections, so none of them takes it before the processes do.
    """
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def two(folder, *arguments, act=train_script):
    """Start two processes as torchrun does, but each ends by itself."""
    shared = {"act": act, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [
        Program(folder / f"rank{i}.txt", *arguments, **shared, RANK=i, LOCAL_RANK=i) for i in (0, 1)
    ]


def numbers(run):
    """Return the rows of metrics.csv but for speed, with -1 for an empty cell."""
    rows = read_metrics(run / "metrics.csv")
    for row in rows:
        del row["images_per_second"]
    return [{name: -1 if cell is None else cell for name, cell in row.items()} for row in rows]


def assert_alike(run, other):
    """Assert that two runs are equal up to the rounding of sums in another order."""
    for row, other_row in zip(numbers(run), numbers(other), strict=True):
        assert other_row == pytest.approx(row, rel=2e-4, nan_ok=True)
    weights = newest(run)["model"]
    torch.testing.assert_close(weights, newest(other)["model"], rtol=1e-3, atol=1e-4)
    assert sample_grids(run).keys() == sample_grids(other).keys()


def test_torchrun_continues_what_one_process_began(unfinished, tiny_run):
    """Rank 0 alone speaks, and has the one progress bar."""
    torchrun = ["--standalone --nproc-per-node 2", ROOT / "train.py", "--resume", unfinished]
    printed = unfinished.parent / "printed"
    program = Program(printed, *torchrun, act=torchrun_program, OMP_NUM_THREADS=1)
    assert program.wait() == 0, program.printed
    assert program.printed.count("finished") == 1
    assert program.printed.count(" 7/10 ") == 1
    assert "processes was 1, is now 2: no longer bit for bit" in program.printed
    assert_alike(tiny_run, unfinished)


def train_with_a_bad_loss():
    """Train; in rank 1, which has two passes a step, the loss is NaN in step 3."""
    if os.environ["RANK"] == "1":
        poison(pytest.MonkeyPatch(), {5: not_a_number})
    train.main()


def test_two_processes_give_the_numbers_of_one(labelled_pictures, tmp_path, monkeypatch):
    """With labels, and with a step that fails in one of them and is left out in both."""
    flags = [FLAGS, "--diffusion.dataset-name", labelled_pictures, "--runs"]
    programs = two(tmp_path, *flags, tmp_path / "two", act=train_with_a_bad_loss)
    assert [program.wait() for program in programs] == [0, 0], programs[1].printed
    together = only_in(tmp_path / "two")
    # Of ten steps, both processes have skipped one.
    assert newest(together)["optimizer"]["step.conv_in.bias"] == 9

    # A single process has three passes a step.
    poison(monkeypatch, {7: not_a_number})
    call(train, *flags, tmp_path / "one")
    assert_alike(only_in(tmp_path / "one"), together)


@pytest.fixture
def at_work(labelled_pictures, tmp_path):
    """Return two processes of a run that does not end by itself, and its folder."""
    flags = "--diffusion.epochs 4000 --diffusion.checkpoint-every 1 --diffusion.dataset-name"
    programs = two(tmp_path, FLAGS, flags, labelled_pictures, "--runs", tmp_path / "runs")
    saved = (tmp_path / "runs").glob
    wait_until(lambda: list(saved("*/checkpoints/step*")), programs[0].is_alive)
    return programs, only_in(tmp_path / "runs")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_other(victim, at_work):
    programs, run = at_work
    programs[victim].kill()
    assert programs[victim].wait() == -signal.SIGKILL
    assert programs[1 - victim].wait() == 1
    assert newest(run)


def test_a_signal_to_one_stops_all_after_the_same_step(at_work):
    programs, run = at_work
    programs[1].terminate()
    assert [program.wait() for program in programs] == [75, 75], programs[1].printed
    assert "stopped by a signal to another process" in programs[0].printed
    # The newest checkpoint is no older than the last row.
    assert newest(run)["run"]["step"] >= read_metrics(run / "metrics.csv")[-1]["step"]


def test_a_refusal_in_rank_0_is_said_once(tmp_path):
    programs = two(tmp_path, "--resume", tmp_path / "nothing")
    assert [program.wait() for program in programs] == [2, 1]
    assert "is not a run folder" in programs[0].printed

    # Some versions of PyTorch say in each process that they are connected.
    assert not re.sub(r"\[Gloo\].*\n", "", programs[1].printed)
