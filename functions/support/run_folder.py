"""Run folders: runs/<experiment>-<YYYYMMDD-HHMMSS>/ with everything about one run.

config.json     the experiment, field by field, and the facts of the run: split, device, precision,
                versions
metrics.csv     one row every `log_every` steps; tensorboard/ has the same numbers as events
losses.png      the curves of metrics.csv
samples/        grids made while training, by step
checkpoints/    step-00001000.safetensors, ...
.lock           held by the process that trains
"""

import json
import math
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

from config import Experiment
from functions.support.checkpoint import SavedModel, check_whole, open_checkpoint
from functions.support.diffusers_folder import is_diffusers
from functions.support.errors import CheckpointError, UserError
from functions.support.files import TensorFile, write_text

Contents = TypeVar("Contents")
# An x_T with a larger terminal SNR still carries the image. The paper's 1000 steps leave 4e-5.
VISIBLE_SNR = 1e-3
# The groups are the experiment and the time of the start.
RUN_NAME = re.compile(r"(.+)-(\d{8}-\d{6})")
# Earlier versions wrote .pt files. They are found, too, so that they are refused with a reason.
CHECKPOINT_NAME = re.compile(r"step-\d{8}\.(safetensors|pt)")


@dataclass(frozen=True)
class Facts:
    """Hold what a run finds when it starts; config.json has it, and each checkpoint."""

    total_steps: int = 0
    steps_per_epoch: int = 0
    # What the images are divided into, and hashes of the ids of those in either part.
    split: str = ""
    train_ids_hash: str = ""
    val_ids_hash: str = ""
    # The number of the network's parameters.
    parameters: int = 0
    terminal_snr: float = 0.0
    device: str = ""
    # Where the first weights come from; None if they were new.
    initial: str | None = None
    # What the bits of the results depend on: precision, threads, versions, ...
    arithmetic: dict = field(default_factory=dict)

    @staticmethod
    def of(checkpoint: TensorFile) -> "Facts":
        """Return those of a checkpoint; what an older one lacks has its default."""
        saved = checkpoint.contents["run"]
        defaults = vars(Facts())
        return Facts(**{name: saved.get(name, defaults[name]) for name in defaults})


@dataclass
class Run:
    """Say of a run which experiment it is, where it lies, and where it stands."""

    # This is the name of the experiment.
    name: str
    # It is all that decides the result.
    experiment: Experiment
    # The run's folder is made in this one, and is None until then.
    runs: Path
    folder: Path | None = None
    # A resumed run goes on from this checkpoint.
    checkpoint: TensorFile | None = None
    # These facts were found when it was written. Of a new run only `initial` can be known.
    before: Facts = Facts()
    # A new run may start from the weights of this model.
    initial: SavedModel | None = None

    @property
    def first_step(self) -> int:
        """Return how many steps are done."""
        return self.checkpoint.contents["run"]["step"] if self.checkpoint else 0

    def make_folder(self) -> None:
        """Make a new, empty folder, unless the run has one. It is never one that exists."""
        self.runs.mkdir(parents=True, exist_ok=True)
        while self.folder is None:
            folder = self.runs / f"{self.name}-{time.strftime('%Y%m%d-%H%M%S')}"
            try:
                folder.mkdir()
                self.folder = folder
            except FileExistsError:
                # Another run has started within the same second.
                time.sleep(0.2)
        for inner in ("samples", "checkpoints"):
            (self.folder / inner).mkdir(exist_ok=True)

    def path_of(self, kind: str, step: int) -> Path:
        """Return the path of a step's file, of kind "checkpoints" or "samples"."""
        ending = "png" if kind == "samples" else "safetensors"
        return self.folder / kind / f"step-{step:08d}.{ending}"

    def write_config(self, facts: Facts) -> str:
        """Write config.json and return its text.

        It has the config as in a checkpoint, and the facts under `run`.
        """
        config = {"experiment": self.name, **self.experiment.to_dict(), "run": vars(facts)}
        text = json.dumps(config, indent=2)
        write_text(self.folder / "config.json", text)
        return text


def describe(run: Run, facts: Facts, data_summary: str) -> str:
    """Describe a run in some lines: data, split, network, length and schedule; then warnings."""
    config = run.experiment.diffusion
    snr = facts.terminal_snr
    done = f"; {run.first_step:,} steps are done" if run.first_step else ""
    lines = [
        run.name,
        f"  data       {data_summary}",
        f"  split      {facts.split}",
        f"  network    {facts.parameters:,} parameters, {facts.arithmetic['precision']}, "
        f"{facts.device}",
        f"  length     {facts.total_steps:,} steps of {config.effective_batch} images: "
        f"{config.epochs} epochs of {facts.steps_per_epoch:,} steps{done}",
    ]
    if facts.initial:
        lines.append(f"  begins as  {facts.initial}")
    lines.append(
        f"  objective  {config.objective}, t {config.t_sampling} over {config.timesteps_diff} "
        f"timesteps with {config.beta_schedule} betas, terminal SNR {snr:.2g}"
    )

    warnings = run.experiment.warnings()
    if snr > VISIBLE_SNR:
        warnings.append(
            f"terminal SNR {snr:.2g} (sqrt(alpha_bar_T) = {math.sqrt(snr / (1 + snr)):.3f}): x_T "
            "still carries the image, and sampling starts from noise that the model never saw; "
            "set rescale_betas = True or use 1000 timesteps"
        )
    if config.ema_decay == 0:
        warnings.append("ema_decay is 0: no EMA, samples use the raw weights")
    # A resumed run repeats the bits of one that never stopped only in the same arithmetic.
    for name, earlier in run.before.arithmetic.items():
        now = facts.arithmetic.get(name)
        if earlier != now:
            warnings.append(
                f"{name} was {earlier}, is now {now}: no longer bit for bit as if never stopped"
            )
    lines.extend(f"warning: {warning}" for warning in warnings)
    return "\n".join(lines)


@contextmanager
def locked(folder: Path, doing: str = "training", leftovers: str = "**/.*.tmp") -> Iterator[None]:
    """Hold a folder for one process.

    `leftovers` is the pattern of files that a process leaves when it is killed while it writes;
    they are deleted. Raises UserError, with what this process is `doing`, when another process is
    at work in the folder.
    """
    # The system drops the lock when the process ends, however it ends.
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
    """Return the run's checkpoints, oldest first."""
    paths = (run / "checkpoints").glob("*")
    return sorted(path for path in paths if CHECKPOINT_NAME.fullmatch(path.name))


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.stem.removeprefix("step-"))


def delete_old(run: Path, done: int, count: int, every: int) -> None:
    """Delete old checkpoints, but not the `count` newest, nor those of every `every`-th step.

    With `every` = 0 only the newest stay.
    """
    # A resumed run leaves checkpoints beyond step `done` when they are damaged, and writes them
    # again. So they do not count.
    written = [path for path in checkpoints_of(run) if step_of(path) <= done]
    for path in written[:-count]:
        if every == 0 or step_of(path) % every:
            # What a calibration measured for a checkpoint goes with it.
            for file in (path, *path.parent.glob(f"{path.stem}-calibration-*.safetensors")):
                file.unlink()


def runs_of(runs: Path, prefix: str = "") -> list[Path]:
    """Return the run folders of experiments whose names start with `prefix`, oldest first."""
    folders = [
        path
        for path in runs.glob("*/")
        if RUN_NAME.fullmatch(path.name) and path.name.startswith(prefix)
    ]
    return sorted(folders, key=lambda path: (RUN_NAME.fullmatch(path.name)[2], path))


def newest_checkpoints(runs: Path, prefix: str = "") -> list[Path]:
    """Return the checkpoints, newest first, of the newest run that has any.

    Raises CheckpointError when there is none.
    """
    for run in reversed(runs_of(runs, prefix)):
        if checkpoints_of(run):
            return find_checkpoints(run)
    what = f"run of an experiment {prefix}*" if prefix else "run"
    flag = "" if runs == Path("runs") else f" --runs {runs}"
    command = "" if prefix else f" (python train.py{flag})"
    raise CheckpointError(
        f"{runs}: no {what} with a checkpoint here yet; "
        f"train one first{command}, or name a checkpoint"
    )


def results_folder(saved: SavedModel, kind: str) -> Path:
    """Return where results of a kind go: into a checkpoint's run, or beside an exported file."""
    # A folder of diffusers is someone else's, so results of such a model go into a new folder.
    if saved.path.is_dir():
        return Path("samples") / f"{saved.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = saved.path.parent
    if folder.name == "checkpoints":
        folder = folder.parent
    return folder / kind


def find_checkpoints(path: Path) -> list[Path]:
    """Return a run's checkpoints, newest first, or a file or a folder of diffusers as it is.

    Raises CheckpointError for another folder.
    """
    checkpoints = checkpoints_of(path)
    if checkpoints:
        return checkpoints[::-1]
    if path.is_dir() and not is_diffusers(path):
        raise CheckpointError(
            f"{path}: no checkpoint in this folder (a run folder has them in checkpoints/)"
        )
    return [path]


def first_intact(candidates: Sequence[Path], read: Callable[[Path], Contents]) -> Contents:
    """Return what `read` returns for the first checkpoint that it can read.

    A loud line is printed for each one before. Raises the last one's error when it can read none.
    """
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
    """Return, for messages, the path of the newest checkpoint whose checksums are right."""
    with suppress(CheckpointError):
        return str(first_intact(find_checkpoints(run), check_whole).path)
    return "there is none yet"


def run_to_resume(wanted: str | None, runs: Path, experiment: str) -> Path | None:
    """Return the folder of the run that goes on; None when a new one is to be started.

    `wanted` is one of these:

        None           a new run
        "newest"       the newest run of the experiment that has a checkpoint and has not reached
                       its last step
        "auto"         the same, or a new run if there is none
        a run's folder

    Raises UserError when there is no such run, and CheckpointError when all checkpoints of a run
    are damaged.
    """
    if wanted is None:
        return None
    if wanted not in ("newest", "auto"):
        # The file of a checkpoint is no run.
        if not Path(wanted).is_dir():
            raise UserError(
                f"{wanted} is not a run folder; "
                "`NAME --resume` takes the newest unfinished run of NAME"
            )
        return Path(wanted)
    for run in reversed(runs_of(runs, experiment)):
        # The name of another experiment may begin with this one's.
        if RUN_NAME.fullmatch(run.name)[1] == experiment and checkpoints_of(run):
            checkpoint = first_intact(find_checkpoints(run), open_checkpoint)
            facts = checkpoint.contents["run"]
            if facts["step"] < facts["total_steps"]:
                return run
    nothing = f"{runs}: no unfinished run of {experiment!r} with a checkpoint"
    if wanted == "newest":
        raise UserError(f"{nothing}; start one without --resume")
    print(f"WARNING: NOTHING TO RESUME ({nothing}). STARTING A NEW RUN.", file=sys.stderr)
    return None
