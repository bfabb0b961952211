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
# An effective batch of 9 in passes of 3: one process has passes 3 3 3, two have 3 1 and 3 2
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
    """Flags of a run that does not end by itself."""
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
    """At which processes can meet."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def two(folder, *arguments, act=train_script):
    """As torchrun starts them, but each ends by itself."""
    shared = {"act": act, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    return [
        Program(folder / f"rank{i}.txt", *arguments, **shared, RANK=i, LOCAL_RANK=i) for i in (0, 1)
    ]


def assert_alike(run, other):
    """Equal up to the rounding of sums in another order."""
    rows = [read_metrics(folder / "metrics.csv") for folder in (run, other)]
    assert len(rows[0]) > 5
    for a, b in zip(*rows, strict=True):
        assert a["skipped_steps"] == b["skipped_steps"]
        for column in ("loss", "eps_error", "val_loss", "val_eps_error_ema", "grad_norm"):
            assert b[column] == (a[column] and pytest.approx(a[column], rel=2e-4, nan_ok=True))
    first, second = newest(run)["model"], newest(other)["model"]
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)
    assert {path.name for path in run.glob("samples/*")} == {
        path.name for path in other.glob("samples/*")
    }


@pytest.mark.parametrize("nccl", [True, False])
def test_processes_meet_by_what_is_there_and_leave_each_other(nccl, monkeypatch):
    asked, left = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: nccl)
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda *args, **named: asked.append((args, named))
    )
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: left.append(True))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    with joined():
        pass
    with pytest.raises(SystemExit), joined():
        sys.exit(EXIT_STOPPED)
    assert len(left) == 2
    for (backend,), named in asked:
        assert backend == ("cpu:gloo,cuda:nccl" if nccl else "gloo")
        assert named["timeout"].days >= 1  # preparing FFHQ on a slow disk takes hours


def test_two_machines_give_the_losses_of_one(pictures, tmp_path, capsys):
    """A torchrun of one process for each; here both are this machine. They recompute blocks, and one goes on alone."""
    call(train.main, *FLAGS, "--diffusion.dataset-name", pictures, "--runs", tmp_path / "1")
    torchrun = [
        "--nnodes",
        2,
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        f"localhost:{free_port()}",
    ]
    flags = [
        *FLAGS,
        "--diffusion.dataset-name",
        pictures,
        "--diffusion.recompute",
        "blocks",
        "--runs",
        tmp_path / "2",
    ]
    torchrun += [ROOT / "train.py", *flags]
    machines = [
        Program(tmp_path / name, *torchrun, act=torchrun_program, OMP_NUM_THREADS=1)
        for name in ("a", "b")
    ]
    assert [machine.wait() for machine in machines] == [0, 0], machines[0].printed
    printed = "".join(machine.printed for machine in machines)
    assert printed.count("finished") == 1  # rank 0 alone speaks
    assert printed.count(" 0/10 ") == 1  # one progress bar
    together = next((tmp_path / "2").iterdir())
    assert_alike(next((tmp_path / "1").iterdir()), together)
    capsys.readouterr()
    call(train.main, "--resume", together, "--diffusion.epochs", 3)
    assert "processes was 2, is now 1: no longer bit for bit" in capsys.readouterr().out


def spoil(patch, most, bad_pass):
    """Give this process no memory for more images than `most`, and a loss that is no number in one pass."""
    forward = UNet.forward

    def limited(network, x_t, t):
        if len(x_t) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.\nmore")
        return forward(network, x_t, t)

    patch.setattr(UNet, "forward", limited)
    poison(patch, {bad_pass: not_a_number})


def train_with_a_bad_rank():
    if os.environ["RANK"] == "1":
        spoil(pytest.MonkeyPatch(), most=3, bad_pass=5)  # the first of step 3
    train.main()


def test_what_fails_in_one_process_is_left_out_in_all(pictures, tmp_path, monkeypatch):
    """The second has no memory for more than three images, and a loss that is no number in step 3."""
    flags = [*FLAGS, "--diffusion.dataset-name", pictures, "--runs"]
    undivided = ["--diffusion.batch-size", 9, "--diffusion.gradient-accumulation", 1]
    programs = two(tmp_path, *flags, tmp_path / "two", *undivided, act=train_with_a_bad_rank)
    assert [program.wait() for program in programs] == [0, 0], programs[1].printed
    assert "out of memory with batch_size = 9, recompute = 'norms'\n" in programs[0].printed
    assert (
        "going on with batch_size = 3, gradient_accumulation = 3, recompute = norms\n"
        in programs[0].printed
    )
    together = next((tmp_path / "two").iterdir())
    assert read_metrics(together / "metrics.csv")[-1]["skipped_steps"] == 1
    assert {step.item() for step in newest(together)["step"].values()} == {9}
    spoil(monkeypatch, most=3, bad_pass=7)  # the first of step 3, of three passes a step
    call(train.main, *flags, tmp_path / "one")
    assert_alike(next((tmp_path / "one").iterdir()), together)


def at_work(runs, alive):
    """The folder of a run, when it has a checkpoint."""
    wait_until(lambda: list(runs.glob("*/checkpoints/*.safetensors")), alive)
    return next(runs.iterdir())


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_other(victim, forever, tmp_path):
    programs = two(tmp_path, *forever)
    at_work(tmp_path / "runs", programs[0].is_alive)
    programs[victim].kill()
    assert programs[victim].wait() == -signal.SIGKILL
    assert programs[1 - victim].wait() == 2
    assert (
        f"error: another process has ended, so process {1 - victim} does too"
        in programs[1 - victim].printed
    )


def test_a_signal_to_one_stops_all_after_the_same_step(forever, tmp_path):
    programs = two(tmp_path, *forever)
    run = at_work(tmp_path / "runs", programs[0].is_alive)
    programs[1].terminate()
    assert [program.wait() for program in programs] == [75, 75]
    assert "stopped by a signal to another process" in programs[0].printed
    assert newest(run)["run"]["step"] >= read_metrics(run / "metrics.csv")[-1]["step"]


@pytest.mark.parametrize(
    ("number", "why"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGKILL, "the end of torchrun")]
)
def test_processes_whose_torchrun_is_stopped_or_killed_save_and_end(number, why, forever, tmp_path):
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        2,
    ]
    agent = subprocess.Popen(
        list(map(str, [*torchrun, "train.py", *forever])),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    run = at_work(tmp_path / "runs", lambda: agent.poll() is None)
    agent.send_signal(number)
    printed, _ = agent.communicate(timeout=PATIENCE)  # until the last of them has closed it
    assert re.search(f"stopped by .*{why}, saved", printed)
    assert agent.returncode == {signal.SIGTERM: 1, signal.SIGKILL: -signal.SIGKILL}[number]
    assert newest(run)["run"]["step"] >= read_metrics(run / "metrics.csv")[-1]["step"]


def test_a_refusal_in_rank_0_is_said_once(tmp_path):
    programs = two(tmp_path, "--resume", tmp_path / "nothing")
    assert [program.wait() for program in programs] == [2, 2]
    assert "is not a run folder" in programs[0].printed
    # PyTorch 2.10 itself says that they are connected
    assert not re.sub(r"\[Gloo\].*\n", "", programs[1].printed)


def test_processes_that_cannot_meet_say_so(monkeypatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)  # and no address
    with pytest.raises(UserError, match="process 1 cannot meet the others: "), joined():
        pass
