"""Kill a real training with SIGKILL at random moments, go on with it, and compare the end with one that was not killed.

`python -m tests.kill --times 50` takes some minutes; tests/test_survival.py does the same with few.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from functions.support import run_folder
from functions.training.metrics import read_metrics
from tests.conftest import ROOT, TINY, draw_pictures, load_checkpoint

EVERY = 2  # steps between checkpoints, so that many a kill meets the writing of one
STEPS_A_KILL = 15  # the run is made so long that it is not over before the last kill


def kill_and_resume(folder: Path, times: int, seed: int = 0) -> str:
    """Run a tiny training twice, once straight and once killed `times` times; AssertionError if the two differ.

    Returns:
        What happened, in a sentence.
    """
    draw_pictures(folder / "pictures")
    epochs = times * (STEPS_A_KILL + 10) // 5 + 2
    command = [sys.executable, ROOT / "train.py", "faces", *TINY, "--diffusion.dataset-name", folder / "pictures",
               "--diffusion.epochs", epochs, "--diffusion.checkpoint-every", EVERY, "--diffusion.log-every", 1,
               "--diffusion.batch-size", 4, "--diffusion.gradient-accumulation", 2]  # fmt: skip
    straight = start(command, folder / "straight")
    assert straight.wait() == 0, "the straight run failed"

    chance, writing, lost = random.Random(seed), 0, 0
    for _ in range(times):
        process = start([*command, "--resume", "auto"], folder / "killed")
        if not any("goes to" in line for line in process.stdout):
            raise AssertionError(f"a resumed run did not start: exit code {process.wait()}")
        (run,) = run_folder.runs_of(folder / "killed")
        until = len(read_metrics(run / "metrics.csv")) + chance.randrange(STEPS_A_KILL)
        while process.poll() is None and len(read_metrics(run / "metrics.csv")) < until:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.05))  # and now within a step, or what follows it
        assert process.poll() is None, "the run was over before it was killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        writing += any(run.rglob(".*.tmp"))
        saved = [load_checkpoint(path)["run"]["step"] for path in run_folder.checkpoints_of(run)]  # all are whole
        logged = [row["step"] for row in read_metrics(run / "metrics.csv")]
        behind = max(logged, default=0) - max(saved, default=0)
        assert behind <= EVERY, f"{behind} steps are lost, with a checkpoint every {EVERY}"
        lost = max(lost, behind)
        if not saved:  # killed before the first: --resume auto starts another run
            for path in sorted(run.rglob("*"), reverse=True):
                path.unlink() if path.is_file() else path.rmdir()
            run.rmdir()
    assert start([*command, "--resume", "auto"], folder / "killed").wait() == 0
    assert_same_run(*run_folder.runs_of(folder / "straight"), *run_folder.runs_of(folder / "killed"))
    return f"killed {times} times, {writing} of them while a file was being written; at most {lost} steps done again"


def start(command: list, runs: Path) -> subprocess.Popen:
    command = [*map(str, command), "--runs", str(runs)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"})  # fmt: skip


def assert_same_run(a: Path, b: Path) -> None:
    """Bit for bit: weights, moments, EMA, counters, sample grids, and every number of metrics.csv but the speed."""
    first, second = (load_checkpoint(run_folder.checkpoints_of(run)[-1]) for run in (a, b))
    assert_equal(first, second)
    grids = [[(path.name, path.read_bytes()) for path in sorted((run / "samples").glob("*.png"))] for run in (a, b)]
    assert grids[0] == grids[1]
    rows = [[{**row, "images_per_second": 0} for row in read_metrics(run / "metrics.csv")] for run in (a, b)]
    assert rows[0] == rows[1]


def assert_equal(a: object, b: object) -> None:
    """Equal containers with equal tensors."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list):
        for one, other in zip(a, b, strict=True):
            assert_equal(one, other)
    else:
        assert a == b or (a != a and b != b)  # nan, the loss of a skipped step


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        print(kill_and_resume(Path(temporary), args.times, args.seed))
