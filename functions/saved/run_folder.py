"""Make and find run folders: runs/<experiment>-<YYYYMMDD-HHMMSS>/ contains all about one run.

config.json     the experiment's fields, and the facts of the run, as in a checkpoint
metrics.csv     one row every `log_every` steps
tensorboard/    the same metrics as events
losses.png      the curves of metrics.csv
samples/        grids of samples, by step
checkpoints/    step-00001000.safetensors, ...
snapshots/      the weights to sample from, in float16, by step: guides for `sample.py --guide`
.lock           a lock that the training process holds

The time is in UTC, so that the newest run is the newest in every time zone.
"""

import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from functions.support.errors import CheckpointError, UserError, warn
from functions.support.settings import check_fields

Result = TypeVar("Result")
# The two groups are the experiment's name and the start time.
RUN_NAME = re.compile(r"(.+)-(\d{8}-\d{6})")
# All runs are in this folder unless a flag names another one.
RUNS = Path("runs")
# The names of checkpoints and snapshots have eight digits.
CHECKPOINT_NAME = re.compile(r"step-\d{8}\.safetensors")


@dataclass(frozen=True)
class DeviceFlags:
    """The flag that names the device."""

    # auto, cpu, cuda, cuda:N or mps.
    device: str = "auto"

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class PlaceFlags(DeviceFlags):
    """The flags that name the folder of all runs and the device."""

    # The folder with all run folders.
    runs: Path = RUNS


def new_folder(parent: Path, name: str = "") -> Path:
    """Make a folder NAME-<time>, of a new run or of samples; without a name its name is the time.

    Raises UserError for a parent that leads over a link to what is not there.
    """
    check_links(parent)
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        folder = parent / (f"{name}-{timestamp()}" if name else timestamp())
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
        # Another one was made within the same second.
        time.sleep(0.2)


def check_links(path: Path) -> None:
    """Raise UserError for a path over a link to what is not there, such as a disk that is away."""
    for place in (path, *path.parents):
        if place.is_symlink() and not place.exists():
            raise UserError(f"{place} is a link to {place.readlink()}, which is not there")


def timestamp() -> str:
    """Return the time for a folder's name, in UTC."""
    return time.strftime("%Y%m%d-%H%M%S", time.gmtime())


def path_of(run: Path, kind: str, step: int) -> Path:
    """Return the path of a step's file. `kind` is "checkpoints", "snapshots" or "samples"."""
    extension = "png" if kind == "samples" else "safetensors"
    return run / kind / f"step-{step:08d}.{extension}"


def paths_in(folder: Path) -> list[Path]:
    """Return the paths in a folder; none if nothing is there.

    Raises OSError for a folder that cannot be read, in which `Path.glob` would find nothing, and
    for a file; and UserError as `check_links` does.
    """
    with suppress(FileNotFoundError):
        return list(folder.iterdir())
    check_links(folder)
    return []


def checkpoints_of(run: Path, folder: str = "checkpoints") -> list[Path]:
    """Return the run's checkpoints, or its "snapshots", oldest first."""
    return sorted(path for path in paths_in(run / folder) if CHECKPOINT_NAME.fullmatch(path.name))


def step_of(checkpoint: Path) -> int:
    """Return the step in the name of a checkpoint or a snapshot."""
    return int(checkpoint.stem.removeprefix("step-"))


def runs_of(runs: Path, prefix: str = "") -> list[Path]:
    """Return the run folders of experiments whose names start with `prefix`, oldest first."""
    folders = [
        path
        for path in paths_in(runs)
        if RUN_NAME.fullmatch(path.name) and path.name.startswith(prefix)
    ]
    return sorted(folders, key=lambda path: (RUN_NAME.fullmatch(path.name)[2], path))


def is_recipe(path: Path) -> bool:
    """Return whether a path is that of a recipe (functions/sampling/settings.py)."""
    return path.suffix == ".toml"


def find_checkpoints(path: Path) -> list[Path]:
    """Return the checkpoints of a run, newest first, or the path of what is no run.

    Raises CheckpointError for a recipe.
    """
    if is_recipe(path):
        raise CheckpointError(f"{path} is a recipe, and no model; name one of its models")
    checkpoints = [] if path.is_file() else checkpoints_of(path)
    return checkpoints[::-1] or [path]


def first_intact(candidates: Sequence[Path], read: Callable[[Path], Result]) -> Result:
    """Return the value of `read` for the first intact checkpoint, with loud warnings.

    If all are damaged, raise the last one's error. Any other error than CheckpointError is raised
    at once: a checkpoint that cannot be read now may be intact, and is not to be overwritten.
    """
    for path, next_path in pairwise(candidates):
        try:
            return read(path)
        except CheckpointError as error:
            warn(f"WARNING: UNUSABLE CHECKPOINT: {error}. Using the one before it: {next_path}")
    return read(candidates[-1])
