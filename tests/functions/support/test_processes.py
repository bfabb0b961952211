"""Several processes train as one does, and none outlives the others."""

import os
import re
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
import weakref
from contextlib import suppress
from datetime import timedelta

import pytest
import torch
from torch.distributed.run import main as torchrun_program

import train
from data import datasets
from functions.support import processes
from functions.support.errors import EXIT_STOPPED, UserError
from functions.support.processes import Processes, distributed
from functions.training.bad_numbers import BadNumbers
from functions.training.metrics import read_metrics
from models.unet import UNet
from tests.conftest import POWER_EMA, POWER_PARTS, ROOT, TINY, call, newest
from tests.forked import PATIENCE, Program, train_script, wait_until
from tests.functions.training.test_bad_numbers import not_a_number, poison

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="torchrun with gloo")]
# The effective batch is 9 images in passes of 3. One process has passes of 3, 3 and 3; of two, the
# first has 3 and 1, the second 3 and 2.
FLAGS = [
    "faces-v",
    *TINY,
    *shlex.split("""
        --diffusion.t-sampling mixed
        --model.dropout 0
        --diffusion.batch-size 3
        --diffusion.gradient-accumulation 3
        --diffusion.validation-samples 20
    """),
]


@pytest.fixture
def forever(pictures, tmp_path):
    """Return the flags of a run that does not end by itself."""
    flags = ["--diffusion.dataset-name", pictures, "--runs", tmp_path / "runs"]
    return [*FLAGS, "--diffusion.epochs", 4000, *flags]


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


def train_and_look():
    """Train, and say whether DDP is gone when the group is destroyed.

    If not, it may hang for ever: it would destroy the group itself, and wait for a thread that
    waits for Python's lock.
    """
    wrap = Processes.wrap
    destroy = torch.distributed.destroy_process_group
    watched = []

    def wrapped(self, model, device):
        network = wrap(self, model, device)
        watched.extend([weakref.ref(network), weakref.ref(network.reducer)])
        return network

    def looked():
        print("left of DDP:", [reference() for reference in watched])
        destroy()

    patch = pytest.MonkeyPatch()
    patch.setattr(Processes, "wrap", wrapped)
    patch.setattr(torch.distributed, "destroy_process_group", looked)
    try:
        train.main()
    except UserError:
        # After an error the group is not destroyed before the end of the process.
        looked()


def train_and_fail():
    """Let both processes end as they do when too many steps are bad, and look."""

    def fail(*_):
        raise UserError("bad numbers")

    pytest.MonkeyPatch().setattr(BadNumbers, "check_counts", fail)
    train_and_look()


def assert_ddp_ended_first(programs):
    for program in programs:
        assert "left of DDP: [None, None]" in program.printed


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

    for part in ("model", *POWER_PARTS):
        torch.testing.assert_close(newest(run)[part], newest(other)[part], rtol=1e-3, atol=1e-4)
    assert names_of_samples(run) == names_of_samples(other)


def names_of_samples(run):
    # Other tests may have sampled from the run, into folders.
    return {path.name for path in run.glob("samples/*.png")}


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
        monkeypatch.setenv(name, "0")

    with distributed():
        pass
    with pytest.raises(SystemExit), distributed():
        sys.exit(EXIT_STOPPED)

    assert len(left) == 2
    for backend, options in asked:
        assert backend == ("cpu:gloo,cuda:nccl" if nccl else "gloo")
        # To prepare FFHQ on a slow disk takes hours, and the other processes wait for it.
        assert options["timeout"].days >= 1


# What NCCL and TCPStore said on other machines.
FULL = (
    "NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled system error, NCCL version 2.27.5\n"
    "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device "
    "error.\nLast error:\nError while creating shared memory segment /dev/shm/nccl-Q0jTgA "
    "(size 9637888), error: No space left on device (28)"
)
CLOSED = (
    "NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited or there was a network error\n"
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting "
    "prematurely.\nLast error:\nsocketProgress: Connection closed by remote peer gpu-2<47218>"
)
LOST = "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server crash?"


@pytest.fixture
def met(monkeypatch):
    """Let a process meet others that are not there."""
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **options: None)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")


@pytest.mark.parametrize("text", [CLOSED, LOST])
def test_a_lost_connection_is_the_end_of_another_process(text, met):
    with pytest.raises(UserError, match=r"^another process has ended"), distributed():
        raise torch.distributed.DistError(text)


def test_other_errors_of_nccl_are_shown_whole(met):
    with pytest.raises(torch.distributed.DistBackendError) as caught, distributed():
        raise torch.distributed.DistBackendError(FULL)
    assert str(caught.value) == FULL


def test_two_machines_give_the_losses_of_one(pictures, tmp_path, capsys):
    """Each machine has a torchrun of one process; here both machines are this one.

    They recompute nothing, and one process alone recomputes norms. In the end it goes on alone.
    """
    flags = [*FLAGS, "--diffusion.dataset-name", pictures, "--diffusion.optimizer", "muon"]
    flags += POWER_EMA
    call(train.main, *flags, "--runs", tmp_path / "1")

    meeting = f"--nnodes 2 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{free_port()}"
    torchrun = [*meeting.split(), ROOT / "train.py", *flags, "--runs", tmp_path / "2"]
    torchrun += ["--diffusion.recompute", "none"]
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
    train_and_look()


def test_what_fails_in_one_process_is_left_out_in_all(pictures, tmp_path, monkeypatch):
    """The second has no memory for more than three images, and a loss that is NaN in step 3."""
    flags = [*FLAGS, "--diffusion.dataset-name", pictures, "--runs"]
    undivided = ["--diffusion.batch-size", 9, "--diffusion.gradient-accumulation", 1]
    programs = two(tmp_path, *flags, tmp_path / "two", *undivided, act=train_with_a_bad_rank)
    assert [program.wait() for program in programs] == [0, 0], programs[1].printed

    assert_ddp_ended_first(programs)
    printed = programs[0].printed
    assert "out of memory with batch_size = 9\n" in printed
    assert "continuing with batch_size = 3, gradient_accumulation = 3\n" in printed

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
    message = f"error: another process has ended or does not answer, so process {survivor} ends"
    assert message in programs[survivor].printed


def train_with_little_patience():
    pytest.MonkeyPatch().setattr(processes, "TRAINING_TIMEOUT", timedelta(seconds=10))
    train_script()


def test_a_process_that_hangs_ends_the_other(forever, tmp_path):
    """As a machine that vanishes does, it leaves its connections open."""
    programs = two(tmp_path, *forever, act=train_with_little_patience)
    at_work(tmp_path / "runs", programs[0].is_alive)

    os.kill(programs[1].pid, signal.SIGSTOP)
    try:
        assert programs[0].wait() == 2
    finally:
        programs[1].kill()
    message = "error: another process has ended or does not answer, so process 0 ends"
    assert message in programs[0].printed
    assert "timed out waiting" in programs[0].printed.lower()


def test_a_signal_to_one_stops_all_after_the_same_step(forever, tmp_path):
    programs = two(tmp_path, *forever, act=train_and_look)
    run = at_work(tmp_path / "runs", programs[0].is_alive)

    programs[1].terminate()
    assert [program.wait() for program in programs] == [75, 75]
    assert_ddp_ended_first(programs)
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
    command = "-m torch.distributed.run --standalone --nproc-per-node 2 train.py"
    command = [sys.executable, *command.split(), *forever]
    torchrun = subprocess.Popen(
        [str(argument) for argument in command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        run = at_work(tmp_path / "runs", lambda: torchrun.poll() is None)

        # The output ends when the last of the processes has closed it.
        torchrun.send_signal(number)
        printed, _ = torchrun.communicate(timeout=PATIENCE)
    finally:
        torchrun.kill()
    assert re.search(f"stopped by .*{why}, saved", printed)
    assert torchrun.returncode == status
    assert has_saved_all_steps(run)


def train_with_slow_images():
    def load_images(*_):
        print("loading")
        # A signal just before a sleep does not shorten it, so no sleep is long.
        while True:
            time.sleep(0.05)

    pytest.MonkeyPatch().setattr(datasets, "load_images", load_images)
    train_script()


def test_ddp_ends_before_the_group_after_an_error_too(forever, tmp_path):
    programs = two(tmp_path, *forever, act=train_and_fail)
    assert [program.wait() for program in programs] == [0, 0]
    assert_ddp_ended_first(programs)


def test_an_interrupt_before_the_first_step_is_one_line(tmp_path):
    """A terminal interrupts all processes, and torchrun does so again."""
    programs = two(tmp_path, *FLAGS, act=train_with_slow_images)
    for program in programs:
        wait_until(lambda program=program: "loading\n" in program.printed, program.is_alive)

    for _ in range(2):
        for program in programs:
            os.kill(program.pid, signal.SIGINT)
    assert [program.wait() for program in programs] == [130, -signal.SIGINT]
    assert programs[0].printed.endswith("loading\ninterrupted\n")
    assert programs[1].printed.endswith("loading\n")


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

    with pytest.raises(UserError, match="process 1 cannot connect to the others: "), distributed():
        pass
