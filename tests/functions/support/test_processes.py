"""Several processes train as one does, and none outlives the others."""

import os
import re
import signal
import socket
import subprocess
import sys

import pytest
import torch
from torch.distributed.run import main as torchrun_program

import train
from functions.support.errors import UserError
from functions.support.processes import joined
from functions.training.metrics import read_metrics
from functions.training.stopping import EXIT_STOPPED
from models.unet import UNet
from tests.conftest import ROOT, TINY, call, newest
from tests.forked import PATIENCE, Program, train_script, wait_until
from tests.functions.training.test_bad_numbers import not_a_number, poison

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="torchrun with gloo")]
# The effective batch is 9 images in passes of 3. One process has passes of 3, 3 and 3; of two, the
# first has 3 and 1, the second 3 and 2.
FLAGS = [
    "faces-v",
    *TINY,
    "--diffusion.t-sampling",
    "mixed",
    "--model.dropout",
    0,
    "--diffusion.batch-size",
    3,
    "--diffusion.gradient-accumulation",
    3,
    "--diffusion.validation-samples",
    20,
]


@pytest.fixture
def forever(pictures, tmp_path):
    """Return the flags of a run that does not end by itself."""
    return [
        *FLAGS,
        "--diffusion.epochs",
        4000,
        "--diffusion.dataset-name",
        pictures,
        "--runs",
        tmp_path / "runs",
    ]


def free_port():
    """Return a port at which processes can meet."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def two(folder, *arguments, act=train_script):
    """Start two processes as torchrun does, but each ends by itself."""
    shared = {"act": act, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    return [
        Program(folder / f"rank{i}.txt", *arguments, **shared, RANK=i, LOCAL_RANK=i) for i in (0, 1)
    ]


def assert_alike(run, other):
    """Assert that two runs are equal up to the rounding of sums in another order."""
    rows = read_metrics(run / "metrics.csv")
    other_rows = read_metrics(other / "metrics.csv")
    assert len(rows) > 5
    for row, other_row in zip(rows, other_rows, strict=True):
        assert row["skipped_steps"] == other_row["skipped_steps"]
        for column in ("loss", "eps_error", "val_loss", "val_eps_error_ema", "grad_norm"):
            expected = row[column]
            # A cell of validation is empty, None, in rows without it; the other run's must be, too.
            if expected:
                expected = pytest.approx(expected, rel=2e-4, nan_ok=True)
            assert other_row[column] == expected

    torch.testing.assert_close(newest(run)["model"], newest(other)["model"], rtol=1e-3, atol=1e-4)
    assert names_of_samples(run) == names_of_samples(other)


def names_of_samples(run):
    return {path.name for path in run.glob("samples/*")}


@pytest.mark.parametrize("nccl", [True, False])
def test_processes_meet_by_what_is_there_and_leave_each_other(nccl, monkeypatch):
    asked = []
    left = []

    def init_process_group(backend, **options):
        asked.append((backend, options))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: nccl)
    monkeypatch.setattr(torch.distributed, "init_process_group", init_process_group)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: left.append(True))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")

    with joined():
        pass
    with pytest.raises(SystemExit), joined():
        sys.exit(EXIT_STOPPED)

    assert len(left) == 2
    for backend, options in asked:
        assert backend == ("cpu:gloo,cuda:nccl" if nccl else "gloo")
        # To prepare FFHQ on a slow disk takes hours, and the other processes wait for it.
        assert options["timeout"].days >= 1


def test_two_machines_give_the_losses_of_one(pictures, tmp_path, capsys):
    """Each machine has a torchrun of one process; here both machines are this one.

    They recompute blocks, which one process alone does not. In the end one process goes on alone.
    """
    flags = [*FLAGS, "--diffusion.dataset-name", pictures]
    call(train.main, *flags, "--runs", tmp_path / "1")

    torchrun = [
        "--nnodes",
        2,
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        f"localhost:{free_port()}",
        ROOT / "train.py",
        *flags,
        "--diffusion.recompute",
        "blocks",
        "--runs",
        tmp_path / "2",
    ]
    machines = [
        Program(tmp_path / name, *torchrun, act=torchrun_program, OMP_NUM_THREADS=1)
        for name in ("a", "b")
    ]
    assert [machine.wait() for machine in machines] == [0, 0], machines[0].printed

    # Rank 0 alone speaks, and has the one progress bar.
    printed = "".join(machine.printed for machine in machines)
    assert printed.count("finished") == 1
    assert printed.count(" 0/10 ") == 1

    alone = next((tmp_path / "1").iterdir())
    together = next((tmp_path / "2").iterdir())
    assert_alike(alone, together)

    capsys.readouterr()
    call(train.main, "--resume", together, "--diffusion.epochs", 3)
    assert "processes was 2, is now 1: no longer bit for bit" in capsys.readouterr().out


def spoil(patch, most, bad_pass):
    """Give this process memory for `most` images at a time, and in one pass a loss that is NaN."""
    forward = UNet.forward

    def limited(network, x_t, t):
        if len(x_t) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.\nmore")
        return forward(network, x_t, t)

    patch.setattr(UNet, "forward", limited)
    poison(patch, {bad_pass: not_a_number})


def train_with_a_bad_rank():
    if os.environ["RANK"] == "1":
        # This process has two passes a step, so its fifth is the first of step 3.
        spoil(pytest.MonkeyPatch(), most=3, bad_pass=5)
    train.main()


def test_what_fails_in_one_process_is_left_out_in_all(pictures, tmp_path, monkeypatch):
    """The second has no memory for more than three images, and a loss that is NaN in step 3."""
    flags = [*FLAGS, "--diffusion.dataset-name", pictures, "--runs"]
    undivided = ["--diffusion.batch-size", 9, "--diffusion.gradient-accumulation", 1]
    programs = two(tmp_path, *flags, tmp_path / "two", *undivided, act=train_with_a_bad_rank)
    assert [program.wait() for program in programs] == [0, 0], programs[1].printed

    printed = programs[0].printed
    assert "out of memory with batch_size = 9, recompute = 'norms'\n" in printed
    settings = "batch_size = 3, gradient_accumulation = 3, recompute = norms"
    assert f"going on with {settings}\n" in printed

    # Of ten steps, all processes have skipped one.
    together = next((tmp_path / "two").iterdir())
    assert read_metrics(together / "metrics.csv")[-1]["skipped_steps"] == 1
    assert {step.item() for step in newest(together)["step"].values()} == {9}

    # A single process has three passes a step, so its seventh is the first of step 3.
    spoil(monkeypatch, most=3, bad_pass=7)
    call(train.main, *flags, tmp_path / "one")
    assert_alike(next((tmp_path / "one").iterdir()), together)


def at_work(runs, alive):
    """Wait until a run has a checkpoint, and return its folder."""
    wait_until(lambda: list(runs.glob("*/checkpoints/*.safetensors")), alive)
    return next(runs.iterdir())


def has_saved_all_steps(run):
    """Say whether the newest checkpoint is no older than the last row of metrics.csv."""
    logged = read_metrics(run / "metrics.csv")[-1]["step"]
    return newest(run)["run"]["step"] >= logged


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_other(victim, forever, tmp_path):
    programs = two(tmp_path, *forever)
    survivor = 1 - victim
    at_work(tmp_path / "runs", programs[0].is_alive)

    programs[victim].kill()
    assert programs[victim].wait() == -signal.SIGKILL
    assert programs[survivor].wait() == 2
    message = f"error: another process has ended, so process {survivor} does too"
    assert message in programs[survivor].printed


def test_a_signal_to_one_stops_all_after_the_same_step(forever, tmp_path):
    programs = two(tmp_path, *forever)
    run = at_work(tmp_path / "runs", programs[0].is_alive)

    programs[1].terminate()
    assert [program.wait() for program in programs] == [75, 75]
    assert "stopped by a signal to another process" in programs[0].printed
    assert has_saved_all_steps(run)


@pytest.mark.parametrize(
    ("number", "status", "why"),
    [
        (signal.SIGTERM, 1, "SIGTERM"),
        (signal.SIGKILL, -signal.SIGKILL, "the end of torchrun"),
    ],
)
def test_processes_whose_torchrun_is_stopped_or_killed_save_and_end(
    number, status, why, forever, tmp_path
):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        2,
        "train.py",
        *forever,
    ]
    torchrun = subprocess.Popen(
        [str(argument) for argument in command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    run = at_work(tmp_path / "runs", lambda: torchrun.poll() is None)

    # The output ends when the last of the processes has closed it.
    torchrun.send_signal(number)
    printed, _ = torchrun.communicate(timeout=PATIENCE)
    assert re.search(f"stopped by .*{why}, saved", printed)
    assert torchrun.returncode == status
    assert has_saved_all_steps(run)


def test_a_refusal_in_rank_0_is_said_once(tmp_path):
    programs = two(tmp_path, "--resume", tmp_path / "nothing")
    assert [program.wait() for program in programs] == [2, 2]
    assert "is not a run folder" in programs[0].printed

    # PyTorch 2.10 itself says in each process that they are connected.
    assert not re.sub(r"\[Gloo\].*\n", "", programs[1].printed)


def test_processes_that_cannot_meet_say_so(monkeypatch):
    # They are told how many they are, but no address.
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(UserError, match="process 1 cannot meet the others: "), joined():
        pass
