"""Several processes train as one does, and none outlives the others."""

import atexit
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
from functions.support import processes
from functions.support.errors import UserError
from functions.support.processes import Processes, distributed
from functions.training.metrics import read_metrics
from tests.conftest import ONE_LEVEL, ROOT, TINY, call, newest
from tests.forked import PATIENCE, Program, train_script, wait_until
from tests.functions.training.test_bad_numbers import not_a_number, poison
from tests.functions.training.test_compiling import use_stub

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="torchrun with gloo")]
# The effective batch is 9 images in passes of 3. One process has passes of 3, 3 and 3; of two, the
# first has 3 and 1, the second 3 and 2.
FLAGS = [
    "faces-v",
    *TINY,
    *shlex.split("""
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
    train.main()


def assert_ended(programs, code):
    """Assert that both end with this status, and destroy DDP before the group."""
    assert [program.wait() for program in programs] == [code, code], programs[1].printed
    assert all("left of DDP: [None, None]" in program.printed for program in programs)


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

    weights = newest(run)["model"]
    torch.testing.assert_close(weights, newest(other)["model"], rtol=1e-3, atol=1e-4)
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
    # The last one is set here so that it is restored after the test.
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHINDUCTOR_COMPILE_THREADS"):
        monkeypatch.setenv(name, "0")

    with distributed():
        pass
    assert len(left) == 1
    # To leave the group could mean to wait for a process that does not answer.
    at_exit = []
    monkeypatch.setattr(atexit, "register", at_exit.append)
    with pytest.raises(KeyError), distributed():
        raise KeyError
    assert len(left) == 1
    assert at_exit == [processes.end_immediately]
    for backend, options in asked:
        assert backend == ("cpu:gloo,cuda:nccl" if nccl else "gloo")
        assert options["timeout"] == timedelta(minutes=30)


def test_two_machines_give_the_losses_of_one(pictures, tmp_path, capsys):
    """Each machine has a torchrun of one process; here both machines are this one.

    In the end one goes on alone.
    """
    flags = [*FLAGS, "--diffusion.dataset-name", pictures, "--diffusion.optimizer", "muon"]
    call(train.main, *flags, "--runs", tmp_path / "1")

    meeting = f"--nnodes 2 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{free_port()}"
    torchrun = [*meeting.split(), ROOT / "train.py", *flags, "--runs", tmp_path / "2"]
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


def train_with_a_bad_rank():
    """Let the loss of one process be NaN in step 3."""
    patch = pytest.MonkeyPatch()
    use_stub(patch, "works")
    if os.environ["RANK"] == "1":
        # This process has two passes a step, so its fifth is the first of step 3.
        poison(patch, {5: not_a_number})
    train_and_look()


def train_compiled():
    use_stub(pytest.MonkeyPatch(), "works")
    train_and_look()


@pytest.mark.parametrize("act", [train_compiled, train_with_a_bad_rank])
def test_two_compiled_processes_give_the_numbers_of_one(act, pictures, tmp_path, monkeypatch):
    """What fails in one of them is left out in both."""
    flags = [*FLAGS, *ONE_LEVEL, "--diffusion.dataset-name", pictures, "--runs"]
    programs = two(tmp_path, *flags, tmp_path / "two", "--diffusion.compile", "true", act=act)
    assert_ended(programs, 0)
    together = next((tmp_path / "two").iterdir())
    checkpoint = newest(together)
    assert checkpoint["run"]["arithmetic"]["compiled"]

    if act is train_with_a_bad_rank:
        # Of ten steps, both processes have skipped one.
        assert read_metrics(together / "metrics.csv")[-1]["skipped_steps"] == 1
        assert checkpoint["optimizer"]["step.conv_in.bias"] == 9
        # A single process has three passes a step, so its seventh is the first of step 3.
        poison(monkeypatch, {7: not_a_number})
    call(train.main, *flags, tmp_path / "one")
    assert_alike(next((tmp_path / "one").iterdir()), together)


COMPILERS = """
from functions.support.processes import distributed
import train
with distributed():
    import torch._inductor.config
    print(torch._inductor.config.compile_threads)
"""


def test_one_of_several_processes_starts_few_compilers(monkeypatch):
    """Nothing has imported the compiler before, which would be too early for the setting."""
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    group = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    program = subprocess.run(
        [sys.executable, "-c", COMPILERS],
        cwd=ROOT,
        env={**os.environ, **group, **address},
        capture_output=True,
        text=True,
        check=True,
    )
    assert program.stdout.splitlines()[-1] == "8"


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
    run = at_work(tmp_path / "runs", programs[0].is_alive)

    programs[victim].kill()
    assert programs[victim].wait() == -signal.SIGKILL
    assert programs[survivor].wait() == 1
    assert newest(run)


def test_an_error_of_python_ends_both_without_a_crash(forever, tmp_path):
    """These processes end as scripts do, with all that Python does at its end."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    flags = [str(flag) for flag in forever]
    programs = []
    for rank in "01":
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        program = subprocess.Popen(
            [sys.executable, "-c", FAILING, *flags],
            cwd=ROOT,
            env={**os.environ, **group, **address},
            stderr=subprocess.PIPE,
            text=True,
        )
        programs.append(program)
    errors = [program.communicate(timeout=PATIENCE)[1] for program in programs]
    assert [program.returncode for program in programs] == [1, 1], errors
    assert "RuntimeError: a bug in step 4" in errors[1]


FAILING = """
import os, train
original = train.learning_rate
def learning_rate(config, step, total_steps):
    if step == 3 and os.environ["RANK"] == "1":
        raise RuntimeError("a bug in step 4")
    return original(config, step, total_steps)
train.learning_rate = learning_rate
train.main()
"""


def train_with_little_patience():
    pytest.MonkeyPatch().setattr(processes, "TIMEOUT", timedelta(seconds=10))
    train_script()


def test_a_process_that_hangs_ends_the_other(forever, tmp_path):
    """As a machine that vanishes does, it leaves its connections open."""
    programs = two(tmp_path, *forever, act=train_with_little_patience)
    at_work(tmp_path / "runs", programs[0].is_alive)

    os.kill(programs[1].pid, signal.SIGSTOP)
    try:
        assert programs[0].wait() == 1
    finally:
        programs[1].kill()
    assert "timed out waiting" in programs[0].printed.lower()


def test_a_signal_to_one_stops_all_after_the_same_step(forever, tmp_path):
    programs = two(tmp_path, *forever, act=train_and_look)
    run = at_work(tmp_path / "runs", programs[0].is_alive)

    programs[1].terminate()
    assert_ended(programs, 75)
    assert "stopped by a signal to another process" in programs[0].printed
    assert has_saved_all_steps(run)


def test_processes_whose_torchrun_is_stopped_save_and_end(forever, tmp_path):
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
        torchrun.terminate()
        printed, _ = torchrun.communicate(timeout=PATIENCE)
    finally:
        torchrun.kill()
    assert "stopped by SIGTERM, saved" in printed
    assert torchrun.returncode == 1
    assert has_saved_all_steps(run)


def train_with_slow_images():
    def load_images(*_):
        print("loading")
        # A signal just before a sleep does not shorten it, so no sleep is long.
        while True:
            time.sleep(0.05)

    pytest.MonkeyPatch().setattr("functions.training.run.load_images", load_images)
    train_script()


def test_an_interrupt_before_the_first_step_is_one_line(tmp_path):
    """A terminal interrupts all processes, and torchrun does so again."""
    programs = two(tmp_path, *FLAGS, act=train_with_slow_images)
    for program in programs:
        wait_until(lambda program=program: "loading\n" in program.printed, program.is_alive)

    for _ in range(2):
        for program in programs:
            os.kill(program.pid, signal.SIGINT)
        # The second signal comes a moment later.
        time.sleep(0.01)
    assert [program.wait() for program in programs] == [130, -signal.SIGINT]
    assert programs[0].printed.endswith("loading\ninterrupted\n")
    assert programs[1].printed.endswith("loading\n")


def test_a_refusal_in_rank_0_is_said_once(tmp_path):
    programs = two(tmp_path, "--resume", tmp_path / "nothing")
    assert [program.wait() for program in programs] == [2, 1]
    assert "is not a run folder" in programs[0].printed

    # PyTorch 2.10 itself says in each process that they are connected.
    assert not re.sub(r"\[Gloo\].*\n", "", programs[1].printed)


def test_a_variable_that_is_no_integer_is_named(monkeypatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(UserError, match="LOCAL_RANK is ''"), distributed():
        pass


def test_processes_that_cannot_meet_say_so(monkeypatch):
    # They are told how many they are, but no address.
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(UserError, match="process 1 cannot connect to the others: "), distributed():
        pass
