"""Run folders: runs/<experiment>-<YYYYMMDD-HHMMSS>/ with everything about one run.

config.json     the experiment, field by field, and what the run found: split, device, precision, versions
metrics.csv     one row every `log_every` steps; the same numbers as TensorBoard events in tensorboard/
losses.png      the curves of metrics.csv
samples/        grids made while training, by step
checkpoints/    step-00001000.safetensors, ...
.lock           held by the process that trains
"""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from functions.support.checkpoint import SavedModel, check_whole, open_checkpoint
from functions.support.diffusers_folder import is_diffusers
from functions.support.errors import CheckpointError, UserError
from functions.support.files import TensorFile, write_text

Contents = TypeVar("Contents")
RUN_NAME = re.compile(r"(.+)-(\d{8}-\d{6})")  # of which experiment, started when
# .pt: of earlier versions, to be refused
CHECKPOINT_NAME = re.compile(r"step-(?P<step>\d{8})\.(safetensors|pt)")


@dataclass
class Run:
    """What a run is: which experiment, where it lies, and where it stands."""

    name: str  # of the experiment
    experiment: object  # config.py's Experiment: all that decides the result
    runs: Path  # where its folder is made
    folder: Path | None = None  # None until it is made
    checkpoint: TensorFile | None = None  # that it goes on from
    initial: SavedModel | None = None  # whose weights a new one starts from
    # What was found when it started: split, length, device, precision, ...
    facts: dict = field(default_factory=dict)

    @property
    def remembered(self) -> dict:
        """What the checkpoint says of the run; empty for a new one."""
        return self.checkpoint.contents["run"] if self.checkpoint else {}

    @property
    def first_step(self) -> int:
        """How many steps are done."""
        return self.remembered.get("step", 0)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        model = self.experiment.model
        return model.channels, model.image_size, model.image_size

    def make_folder(self) -> None:
        """A new, empty folder unless the run has one; never one that exists."""
        self.runs.mkdir(parents=True, exist_ok=True)
        while self.folder is None:
            folder = self.runs / f"{self.name}-{time.strftime('%Y%m%d-%H%M%S')}"
            try:
                folder.mkdir()
                self.folder = folder
            except FileExistsError:  # another run started within the same second
                time.sleep(0.2)
        for inner in ("samples", "checkpoints"):
            (self.folder / inner).mkdir(exist_ok=True)

    def path_of(self, kind: str, step: int) -> Path:
        """The file of a step: of kind "checkpoints" or "samples"."""
        return (
            self.folder / kind / f"step-{step:08d}.{'png' if kind == 'samples' else 'safetensors'}"
        )

    def write_config(self) -> str:
        """Write config.json, the config as in a checkpoint and under `run` the facts, and return its text."""
        text = json.dumps(
            {"experiment": self.name, **self.experiment.to_dict(), "run": self.facts}, indent=2
        )
        write_text(self.folder / "config.json", text)
        return text


@contextmanager
def locked(folder: Path, doing: str = "training", leftovers: str = "**/.*.tmp") -> Iterator[None]:
    """Hold a folder for one process; the system drops the lock when the process ends, however it ends.

    `leftovers` are files of a process that was killed while it wrote, by their pattern; they are deleted. Raises
    UserError, with what this one is `doing`, when another process is at work in it.
    """
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"{folder}: another process is {doing} in this folder already") from error
    except (NotImplementedError, OSError):
        print(
            f"warning: {folder} is on a disk without locks: start nothing else in it",
            file=sys.stderr,
        )
    try:
        for leftover in folder.glob(leftovers):
            leftover.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def checkpoints_of(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted(
        path for path in (run / "checkpoints").glob("*") if CHECKPOINT_NAME.fullmatch(path.name)
    )


def step_of(checkpoint: Path) -> int:
    return int(CHECKPOINT_NAME.fullmatch(checkpoint.name)["step"])


def delete_old(run: Path, done: int, count: int, every: int) -> None:
    """Delete old checkpoints: all but the `count` newest, and those of every `every`-th step (0: none).

    Those beyond step `done` are not counted: a resumed run leaves them when they are damaged, and writes them anew.
    """
    for path in [path for path in checkpoints_of(run) if step_of(path) <= done][:-count]:
        if every == 0 or step_of(path) % every:
            for file in (path, *path.parent.glob(f"{path.stem}-calibration-*.safetensors")):
                file.unlink()


def runs_of(runs: Path, prefix: str = "") -> list[Path]:
    """Run folders of experiments whose names start with `prefix`, oldest first."""
    found = [
        path
        for path in runs.glob("*/")
        if path.name.startswith(prefix) and RUN_NAME.fullmatch(path.name)
    ]
    return sorted(found, key=lambda path: (RUN_NAME.fullmatch(path.name)[2], path))


def newest_checkpoints(runs: Path, prefix: str = "") -> list[Path]:
    """The checkpoints, newest first, of the newest run that has any. `CheckpointError` when there is none."""
    for run in reversed(runs_of(runs, prefix)):
        if checkpoints_of(run):
            return find_checkpoints(run)
    what = f"run of an experiment {prefix}*" if prefix else "run"
    how = "" if prefix else f" (python train.py{'' if runs == Path('runs') else f' --runs {runs}'})"
    raise CheckpointError(
        f"{runs}: no {what} with a checkpoint here yet; train one first{how}, or name a checkpoint"
    )


def results_folder(saved: SavedModel, kind: str) -> Path:
    """Where results of a kind go: into the run of a checkpoint, beside an exported file, never to where others' lie."""
    if saved.path.is_dir():
        return Path("samples") / f"{saved.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    inside = saved.path.parent.name == "checkpoints"
    return (saved.path.parent.parent if inside else saved.path.parent) / kind


def find_checkpoints(path: Path) -> list[Path]:
    """A run's checkpoints, newest first; a file, or a folder of diffusers, as it is; else `CheckpointError`."""
    found = checkpoints_of(path)
    if not found and (not path.is_dir() or is_diffusers(path)):
        return [path]
    if not found:
        raise CheckpointError(
            f"{path}: no checkpoint in this folder (a run folder has them in checkpoints/)"
        )
    return found[::-1]


def first_sound(candidates: Sequence[Path], read: Callable[[Path], Contents]) -> Contents:
    """What was read of the first checkpoint that reads, with a loud line for each before; else the last one's error."""
    for path, following in pairwise(candidates):
        try:
            return read(path)
        except CheckpointError as error:
            print(
                f"WARNING: DAMAGED CHECKPOINT: {error}. Taking the one before it: {following}",
                file=sys.stderr,
            )
    return read(candidates[-1])


def last_checkpoint(run: Path) -> str:
    """The newest checkpoint whose checksums are right, for messages."""
    for path in reversed(checkpoints_of(run)):
        with suppress(CheckpointError):
            return str(check_whole(path).path)
    return "there is none yet"


def run_to_resume(wanted: str | None, runs: Path, experiment: str) -> Path | None:
    """The folder of the run that goes on; None when a new one is to be started.

    `wanted` is a run's folder; "newest", the newest run of the experiment that has a checkpoint and has not reached its
    last step; "auto", that, or a new run if there is none; None, a new run. Raises UserError when there is no such run,
    CheckpointError when all checkpoints of a run are damaged.
    """
    if wanted is None:
        return None
    if wanted not in ("newest", "auto"):
        if not Path(wanted).is_dir():  # a checkpoint's file is no run
            raise UserError(
                f"{wanted} is not a run folder; `NAME --resume` takes the newest unfinished run of NAME"
            )
        return Path(wanted)
    for run in reversed(runs_of(runs, experiment)):
        if RUN_NAME.fullmatch(run.name)[1] == experiment and checkpoints_of(run):
            stands = first_sound(find_checkpoints(run), open_checkpoint).contents["run"]
            if stands["step"] < stands["total_steps"]:
                return run
    nothing = f"{runs}: no unfinished run of {experiment!r} with a checkpoint"
    if wanted == "newest":
        raise UserError(f"{nothing}; start one without --resume")
    print(f"WARNING: NOTHING TO RESUME ({nothing}). STARTING A NEW RUN.", file=sys.stderr)
    return None
