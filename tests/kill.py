"""Kill a real training with SIGKILL at random moments, go on with it, and compare the end with one that was not killed.

`python -m tests.kill --times 50` takes some minutes; test_survival.py does the same with few.
"""

import argparse
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

from functions.support import run_folder
from functions.training.metrics import read_metrics
from tests.conftest import TINY, draw_pictures, load_checkpoint
from tests.forked import Program, wait_until
from tests.spoilt_files import same

EVERY = 2  # steps between checkpoints, so that many a kill meets the writing of one
STEPS_A_KILL = 8  # at most, from a start to its kill
# More steps for each kill, so that the run is not over before the last one, however late it comes
MARGIN = 17


def kill_and_resume(folder: Path, times: int, seed: int = 0) -> str:
    """Run a tiny training straight, and killed `times` times; AssertionError if they differ. Returns what happened."""
    epochs = times * (STEPS_A_KILL + MARGIN) // 5 + 2
    flags = [
        "faces",
        *TINY,
        "--diffusion.dataset-name",
        draw_pictures(folder / "pictures"),
        "--diffusion.epochs",
        epochs,
        "--diffusion.checkpoint-every",
        EVERY,
        "--diffusion.log-every",
        1,
        "--diffusion.validate-every",
        20,
        "--diffusion.sample-every",
        20,
        "--diffusion.batch-size",
        4,
        "--diffusion.gradient-accumulation",
        2,
        "--diffusion.recompute",
        "none",
    ]
    straight = Program(folder / "straight.txt", *flags, "--runs", folder / "straight")
    assert straight.wait() == 0, straight.printed

    flags += ["--resume", "auto", "--runs", folder / "killed"]
    chance, writing, lost = random.Random(seed), 0, 0
    for _ in range(times):
        program = Program(folder / "killed.txt", *flags)
        run = kill(
            program, folder / "killed", chance.randrange(STEPS_A_KILL), chance.uniform(0, 0.05)
        )
        writing += any(run.rglob(".*.tmp"))
        # All are whole
        saved = [load_checkpoint(path)["run"]["step"] for path in run_folder.checkpoints_of(run)]
        logged = [row["step"] for row in read_metrics(run / "metrics.csv")]
        behind = max(logged, default=0) - max(saved, default=0)
        assert behind <= EVERY, f"{behind} steps are lost, with a checkpoint every {EVERY}"
        lost = max(lost, behind)
        if not saved:  # killed before the first: --resume auto starts another run
            shutil.rmtree(run)
    last = Program(folder / "killed.txt", *flags)
    assert last.wait() == 0, last.printed
    assert_same_run(
        *run_folder.runs_of(folder / "straight"), *run_folder.runs_of(folder / "killed")
    )
    return f"killed {times} times, {writing} of them while a file was being written; at most {lost} steps done again"


def kill(program: Program, runs: Path, steps: int, seconds: float) -> Path:
    """So many steps and seconds after it has started; returns the run's folder."""
    wait_until(lambda: "goes to" in program.printed, program.is_alive)
    (run,) = run_folder.runs_of(runs)
    until = len(read_metrics(run / "metrics.csv")) + steps
    wait_until(lambda: len(read_metrics(run / "metrics.csv")) >= until, program.is_alive)
    time.sleep(seconds)  # and now within a step, or what follows it
    program.kill()
    assert program.wait() == -signal.SIGKILL, "the run was over before it was killed"
    return run


def assert_same_run(a: Path, b: Path) -> None:
    """Bit for bit: weights, moments, EMA, counters, sample grids, and every number of metrics.csv but the speed."""
    first, second = (load_checkpoint(run_folder.checkpoints_of(run)[-1]) for run in (a, b))
    assert first.keys() == second.keys()
    for part in first:
        assert same(first[part], second[part]), f"another {part}"
    grids = [
        [(path.name, path.read_bytes()) for path in sorted((run / "samples").glob("*.png"))]
        for run in (a, b)
    ]
    assert grids[0] == grids[1]
    rows = [
        [{**row, "images_per_second": 0} for row in read_metrics(run / "metrics.csv")]
        for run in (a, b)
    ]
    assert same(*rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        print(kill_and_resume(Path(temporary), args.times, args.seed))
