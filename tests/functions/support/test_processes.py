"""Several processes train as one does, and none outlives the others. Real processes, started by torchrun."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from functions.support import run_folder
from functions.support.processes import Processes
from functions.training.metrics import read_metrics
from tests.conftest import ROOT, TINY, load_checkpoint, script

pytestmark = pytest.mark.skipif(os.name != "posix", reason="torchrun with gloo")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
FLAGS = ["faces", *TINY, "--diffusion.batch-size", 3, "--diffusion.gradient-accumulation", 3, "--model.dropout", 0,
         "--diffusion.validation-samples", 20]  # fmt: skip


def start(program, *arguments, torchrun=TORCHRUN):
    return subprocess.Popen([*torchrun, *map(str, [program, *arguments])], cwd=ROOT, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def close(a, b):
    """Equal up to the rounding of sums in another order."""
    for name, tensor in a["model"].items():
        torch.testing.assert_close(tensor, b["model"][name], rtol=1e-3, atol=1e-4)


def test_two_processes_give_the_losses_of_one(pictures, tmp_path):
    """An effective batch of 9 in passes of 3: one process has passes 3 3 3, two have 3 1 and 3 2. Then one goes on.

    The two make blocks again in backward, which must not disturb the exchange of gradients.
    """
    one = script("train.py", *FLAGS, "--diffusion.dataset-name", pictures, "--runs", tmp_path / "one")
    assert one.returncode == 0, one.stderr
    two = start("train.py", *FLAGS, "--diffusion.dataset-name", pictures, "--runs", tmp_path / "two",
                "--diffusion.recompute", "blocks")  # fmt: skip
    printed, errors = two.communicate(timeout=200)
    assert two.returncode == 0, errors
    assert printed.count("finished") == 1  # rank 0 alone speaks
    assert errors.count(" 0/10 ") == 1  # one progress bar
    alone, together = next((tmp_path / "one").iterdir()), next((tmp_path / "two").iterdir())
    rows = [read_metrics(run / "metrics.csv") for run in (alone, together)]
    assert len(rows[0]) > 5
    for a, b in zip(*rows, strict=True):
        for column in ("loss", "val_loss", "val_loss_ema", "grad_norm"):
            assert b[column] == (a[column] and pytest.approx(a[column], rel=2e-4))
    states = [load_checkpoint(run_folder.checkpoints_of(run)[-1]) for run in (alone, together)]
    close(*states)
    assert [path.name for path in sorted((alone / "samples").iterdir())] == [
        path.name for path in sorted((together / "samples").iterdir())
    ]
    resumed = script("train.py", "--resume", together, "--diffusion.epochs", 3)
    assert resumed.returncode == 0, resumed.stderr
    assert "processes was 2, is now 1: no longer bit for bit" in resumed.stdout


def test_two_machines_give_the_losses_of_one(pictures, tmp_path, tiny_run):
    """A torchrun for each machine, with one process each, that meet at an address; here both are this machine."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
                "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}"]  # fmt: skip
    machines = [
        start("train.py", "faces", *TINY, "--diffusion.dataset-name", pictures, "--runs", tmp_path, torchrun=torchrun)
        for _ in range(2)
    ]
    outputs = [machine.communicate(timeout=200) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    rows = [read_metrics(run / "metrics.csv") for run in (next(tmp_path.iterdir()), tiny_run)]
    for ours, alone in zip(*rows, strict=True):
        assert ours["loss"] == pytest.approx(alone["loss"], rel=2e-4)


WITH_A_BAD_RANK = """
import math, os, train
from tests.conftest import call
import sys
original, calls = train.noise_prediction_loss, []
def loss(*args):
    calls.append(1)
    return original(*args) * (math.nan if os.environ["RANK"] == "1" and len(calls) == 3 else 1)
train.noise_prediction_loss = loss
call(train.main, *sys.argv[1:])
"""


def test_a_bad_number_in_one_process_skips_the_step_in_all(pictures, tmp_path):
    (tmp_path / "bad.py").write_text(WITH_A_BAD_RANK)
    run = start(tmp_path / "bad.py", *FLAGS, "--diffusion.batch-size", 8, "--diffusion.gradient-accumulation", 1,
                "--diffusion.dataset-name", pictures, "--runs", tmp_path / "runs")  # fmt: skip
    _, errors = run.communicate(timeout=200)
    assert run.returncode == 0, errors
    folder = next((tmp_path / "runs").iterdir())
    assert read_metrics(folder / "metrics.csv")[-1]["skipped_steps"] == 1
    saved = load_checkpoint(run_folder.checkpoints_of(folder)[-1])
    assert {step.item() for step in saved["step"].values()} == {9}
    assert all(tensor.isfinite().all() for tensor in saved["ema"].values())


WORKERS = """
import os, sys, train
from tests.conftest import call
with open(f"{folder}/rank{rank}", "w") as file:
    file.write(str(os.getpid()))
with train.plain_errors():
    call(train.main, *sys.argv[1:])
"""


def started(tmp_path, pictures, epochs=4000):
    """Two processes in the middle of a long training, and their numbers by rank."""
    code = WORKERS.replace("{folder}", str(tmp_path)).replace("{rank}", "{os.environ['RANK']}")
    (tmp_path / "worker.py").write_text(code)
    run = start(tmp_path / "worker.py", *FLAGS, "--diffusion.dataset-name", pictures, "--runs", tmp_path / "runs",
                "--diffusion.epochs", epochs)  # fmt: skip
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and not list(tmp_path.glob("runs/*/checkpoints/*.safetensors")):
        time.sleep(0.1)
    return run, [int((tmp_path / f"rank{rank}").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_others(victim, pictures, tmp_path):
    run, pids = started(tmp_path, pictures)
    os.kill(pids[victim], signal.SIGKILL)
    _, errors = run.communicate(timeout=60)
    assert run.returncode != 0
    assert "SIGKILL" in errors or "Signal 9" in errors
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("target", ["rank 1", "torchrun", "all"])
def test_a_signal_stops_all_after_the_same_step(target, pictures, tmp_path):
    """torchrun hands its own SIGTERM on to all; a scheduler may reach only one of them."""
    run, pids = started(tmp_path, pictures)
    for pid in {"rank 1": pids[1:], "torchrun": [run.pid], "all": [*pids, run.pid]}[target]:
        os.kill(pid, signal.SIGTERM)
    printed, errors = run.communicate(timeout=60)
    assert re.search(f"stopped by {'a signal to another' if target == 'rank 1' else 'SIGTERM'}.*, saved", printed)
    if target == "rank 1":  # torchrun then says how its processes ended
        assert "exitcode: 75" in errors
    folder = next((tmp_path / "runs").iterdir())
    rows = [row["step"] for row in read_metrics(folder / "metrics.csv")]
    assert load_checkpoint(run_folder.checkpoints_of(folder)[-1])["run"]["step"] >= rows[-1]


def test_processes_whose_torchrun_has_ended_save_and_stop(pictures, tmp_path):
    run, pids = started(tmp_path, pictures)
    run.kill()
    run.wait()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and any(os.path.exists(f"/proc/{pid}") for pid in pids):
        time.sleep(0.1)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    run.stdout.close()
    run.stderr.close()


def test_a_refusal_in_rank_0_is_said_once(pictures, tmp_path):
    run = start("train.py", "--resume", tmp_path / "nothing")
    _, errors = run.communicate(timeout=100)
    assert run.returncode != 0
    assert errors.count("is not a run folder") == 1


def test_one_process_shares_nothing():
    alone, tensor = Processes(), torch.ones(2)
    assert alone.sum_(tensor) is tensor
    assert alone.gather(3) == [3]
    assert alone.from_main(lambda: 5) == 5
    assert alone.any(True) is True
    assert alone.any(False) is False
    assert alone.own_range(9) == range(9)
