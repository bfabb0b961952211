"""Run folders: runs/<experiment>-<YYYYMMDD-HHMMSS>/ with everything about one run.

config.json     the experiment, field by field, and what the run found: split, device, precision, versions
metrics.csv     one row every `log_every` steps; the same numbers as TensorBoard events in tensorboard/
losses.png      the curves of metrics.csv
samples/        grids made while training, by step
checkpoints/    step-00001000.pt, ...
.lock           held by the process that trains; holds its number
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from functions.support.checkpoint import check_whole, load_checkpoint, write_whole
from functions.support.errors import CheckpointError, NothingToResume

try:
    import fcntl
except ImportError:  # Windows: two trainings in one run folder are not noticed there
    fcntl = None

Contents = TypeVar("Contents")


RUN_NAME = re.compile(r"(?P<experiment>.+)-(?P<time>\d{8}-\d{6})")
CHECKPOINT_NAME = re.compile(r"step-(?P<step>\d{8})\.pt")


def create_run(runs: Path, experiment: str) -> Path:
    """A new, empty run folder; never one that exists."""
    while True:
        run = runs / f"{experiment}-{time.strftime('%Y%m%d-%H%M%S')}"
        try:
            run.mkdir(parents=True)
        except FileExistsError:  # another run started within the same second
            time.sleep(0.2)
            continue
        for folder in ("samples", "checkpoints"):
            (run / folder).mkdir()
        return run


def checkpoint_path(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}.pt"


def checkpoints_of(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("*.pt") if CHECKPOINT_NAME.fullmatch(path.name))


def step_of(checkpoint: Path) -> int:
    return int(CHECKPOINT_NAME.fullmatch(checkpoint.name)["step"])


def keep(run: Path, done: int, count: int, every: int) -> None:
    """Delete old checkpoints: all but the `count` newest, and those of every `every`-th step (0: none).

    Those beyond step `done` are not counted: a resumed run leaves them when they are damaged, and writes them anew.
    """
    for path in [path for path in checkpoints_of(run) if step_of(path) <= done][:-count]:
        if every == 0 or step_of(path) % every:
            path.unlink()


@contextmanager
def locked(run: Path, doing: str = "training", leftovers: str = "**/.*.tmp") -> Iterator[None]:
    """Hold a folder for one process; the system gives it free when the process ends, however it ends.

    Args:
        doing: what is to be done in it, for messages.
        leftovers: files of a process that was killed while it wrote, by their pattern; they are deleted.

    Raises:
        CheckpointError: another process is at work in it.
    """
    with open(run / ".lock", "a+") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise CheckpointError(f"{run}: process {file.read() or '?'} is {doing} in this folder already") from error
        except OSError as error:  # some network disks have no locks
            print(f"warning: {run} cannot be locked ({error.strerror}): start nothing else in it")
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        for leftover in run.glob(leftovers):
            leftover.unlink(missing_ok=True)
        yield


def runs_of(runs: Path, prefix: str = "") -> list[Path]:
    """Run folders of experiments whose names start with `prefix`, oldest first."""
    found = [(RUN_NAME.fullmatch(path.name), path) for path in runs.glob("*/")] if runs.is_dir() else []
    named = [(match["time"], path) for match, path in found if match and match["experiment"].startswith(prefix)]
    return [path for _, path in sorted(named)]


def newest_checkpoints(runs: Path, prefix: str = "") -> list[Path]:
    """The checkpoints, newest first, of the newest run that has any.

    Raises:
        CheckpointError: there is none.
    """
    for run in reversed(runs_of(runs, prefix)):
        if checkpoints_of(run):
            return find_checkpoints(run)
    what = f"run of an experiment {prefix}*" if prefix else "run"
    raise CheckpointError(f"{runs}: no {what} with a checkpoint here yet; train one first, or name a checkpoint")


def folder_of(checkpoint: Path) -> Path:
    """The run folder that a checkpoint lies in; the folder of any other file."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent


def find_checkpoints(path: Path) -> list[Path]:
    """A checkpoint file as it is, or a run folder's checkpoints, newest first.

    Raises:
        CheckpointError: nothing there, or a folder without checkpoints.
    """
    if path.is_dir():
        found = checkpoints_of(path)
        if not found:
            raise CheckpointError(f"{path}: no checkpoint in this folder (a run folder has them in checkpoints/)")
        return found[::-1]
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file or folder")
    return [path]


def first_sound(candidates: Sequence[Path], read: Callable[[Path], Contents]) -> tuple[Path, Contents]:
    """The first checkpoint that reads, and what was read; for each one passed over, a loud line.

    Raises:
        CheckpointError: the last one's, when none does.
    """
    for path, following in zip(candidates, [*candidates[1:], None], strict=True):
        try:
            return path, read(path)
        except CheckpointError as error:
            if following is None:
                raise
            print(f"WARNING: DAMAGED CHECKPOINT: {error}. Taking the one before it: {following}", file=sys.stderr)
    raise AssertionError("there must be candidates")


def last_checkpoint(run: Path) -> str:
    """The newest checkpoint whose checksums are right, for messages."""
    for path in reversed(checkpoints_of(run)):
        try:
            check_whole(path)
            return str(path)
        except CheckpointError:
            continue
    return "there is none yet"


def newest_unfinished(runs: Path, experiment: str) -> Path:
    """The newest run of exactly this experiment that has a checkpoint and has not reached its last step.

    Raises:
        NothingToResume: there is none.
        CheckpointError: there is one, but all its checkpoints are damaged.
    """
    for run in reversed(runs_of(runs, experiment)):
        if RUN_NAME.fullmatch(run.name)["experiment"] != experiment or not checkpoints_of(run):
            continue
        newest, _ = first_sound(find_checkpoints(run), check_whole)
        try:
            finished = step_of(newest) >= read_config(run)["run"]["total_steps"]
        except CheckpointError:  # config.json is for people; the checkpoint knows, but takes longer to read
            finished = False
        if not finished:
            position = load_checkpoint(newest)["run"]
            finished = position["step"] >= position["total_steps"]
        if not finished:
            return run
    raise NothingToResume(f"{runs}: no unfinished run of {experiment!r} with a checkpoint; start one without --resume")


def run_to_resume(wanted: str | None, runs: Path, experiment: str) -> Path | None:
    """The folder of the run that goes on; None when a new one is to be started.

    Args:
        wanted: a run's folder; "newest", the newest unfinished run of the experiment; "auto", that, or a new run if
            there is none; None, a new run.
    """
    if wanted not in ("newest", "auto"):
        return Path(wanted) if wanted else None
    try:
        return newest_unfinished(runs, experiment)
    except NothingToResume as error:
        if wanted == "newest":
            raise
        print(f"WARNING: NOTHING TO RESUME ({error}). STARTING A NEW RUN.", file=sys.stderr)
        return None


def write_config(run: Path, experiment: str, config: dict, facts: dict) -> None:
    """config.json: the config as in a checkpoint, and under `run` what was found when it started."""
    text = json.dumps({"experiment": experiment, **config, "run": facts}, indent=2)
    write_whole(run / "config.json", lambda file: file.write(text.encode()))


def read_config(run: Path) -> dict:
    """The content of config.json; `CheckpointError` when it is missing or damaged."""
    try:
        contents = json.loads((run / "config.json").read_text())
        sound = isinstance(contents["experiment"], str) and type(contents["run"]["total_steps"]) is int
        if not sound:
            raise ValueError("experiment or total_steps is of another type")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{run / 'config.json'}: missing or damaged, so this is not a usable run") from error
    return contents
