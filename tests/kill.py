"""Kill a real training at random moments, resume it, and compare its end with an undisturbed one's.

`python -m tests.kill --times 50` takes some minutes; test_survival.py does the same with few kills.
"""

import argparse
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

from functions.saved.run_folder import checkpoints_of, runs_of
from functions.training.metrics import read_metrics
from tests.conftest import ONE_LEVEL, TINY, draw_pictures, load_checkpoint, newest, only_in
from tests.forked import Program, wait_until
from tests.small_training import same

# So few steps lie between two checkpoints that many a kill meets the writing of one.
EVERY = 2
# Each kill comes within this time of a start; some ten steps take as long.
SECONDS = 0.4


def kill_and_resume(folder: Path, times: int) -> str:
    """Train a tiny run without a pause, and another that is killed `times` times; compare them.

    There are fewer kills when the run ends before one. Returns what happened. Raises AssertionError
    when the two differ, or when nothing was killed.
    """
    # One level makes steps short, and most of the time writes. An epoch has five steps.
    flags = ["faces", TINY, ONE_LEVEL]
    flags += ["--diffusion.dataset-name", draw_pictures(folder / "pictures")]
    flags.append(f"""
        --diffusion.epochs {3 * (times + 1)}
        --diffusion.checkpoint-every {EVERY}
        --diffusion.log-every 1
        --diffusion.validate-every 20
        --diffusion.sample-every 20
        --diffusion.batch-size 4
        --diffusion.gradient-accumulation 2
    """)
    straight = Program(folder / "straight.txt", *flags, "--runs", folder / "straight")
    assert straight.wait() == 0, straight.printed

    flags += ["--resume auto --runs", folder / "killed"]
    rng = random.Random(0)
    kills = 0
    kills_in_a_write = 0
    while True:
        program = Program(folder / "killed.txt", *flags)
        if kills < times:
            kill(program, rng.uniform(0, SECONDS))
        if program.wait() == 0:
            break
        assert program.wait() == -signal.SIGKILL, program.printed
        kills += 1

        [run] = runs_of(folder / "killed")
        kills_in_a_write += any(run.rglob(".*tmp*"))
        # Each checkpoint is read as a whole here, so none may be damaged.
        saved = [load_checkpoint(path)["run"]["step"] for path in checkpoints_of(run)]
        logged = [row["step"] for row in read_metrics(run / "metrics.csv")]
        lost = max(logged, default=0) - max(saved, default=0)
        assert lost <= EVERY, f"{lost} steps are lost, with a checkpoint every {EVERY}"

        # Without a checkpoint --resume auto starts another run, and this one would lie beside it.
        if not saved:
            shutil.rmtree(run)

    assert kills > 0, "the run was over before it was killed"
    assert_same_run(only_in(folder / "straight"), only_in(folder / "killed"))
    return f"killed {kills} times, {kills_in_a_write} of them while a file was being written"


def kill(program: Program, seconds: float) -> None:
    """Kill a training so many seconds after its start."""
    wait_until(lambda: "goes to" in program.printed, program.is_alive)
    time.sleep(seconds)
    program.kill()


def assert_same_run(a: Path, b: Path) -> None:
    """Assert that two runs are equal bit for bit in all but speed."""
    first = results_of(a)
    second = results_of(b)
    assert first.keys() == second.keys()
    for what in first:
        assert same(first[what], second[what]), f"another {what}"


def results_of(run: Path) -> dict:
    """Return weights, moments, EMA, counters, snapshots, grids, and the numbers of metrics.csv."""
    return {
        **newest(run),
        "snapshots": [load_checkpoint(path) for path in checkpoints_of(run, "snapshots")],
        "grids": sample_grids(run),
        "rows": [{**row, "images_per_second": 0} for row in read_metrics(run / "metrics.csv")],
    }


def sample_grids(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "samples").glob("*.png")}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=50)
    with tempfile.TemporaryDirectory() as temporary:
        print(kill_and_resume(Path(temporary), parser.parse_args().times))
