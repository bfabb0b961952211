"""Make and find run folders: runs/<experiment>-<YYYYMMDD-HHMMSS>/ contains all about one run.

config.json     the experiment's fields, and the `Facts` of the run
metrics.csv     one row every `log_every` steps
tensorboard/    the same metrics as events
losses.png      the curves of metrics.csv
samples/        grids of samples, by step
checkpoints/    step-00001000.safetensors, ...
snapshots/      the weights to sample from, in float16, by step: guides for `sample.py --guide`
.lock           a lock that the training process holds
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
from functions.support.checkpoint import SavedModel, open_checkpoint, verify_checkpoint
from functions.support.diffusers_folder import is_diffusers_folder
from functions.support.errors import CheckpointError, UserError
from functions.support.files import TensorFile, write_text

Result = TypeVar("Result")
# With a terminal SNR above this, x_T still shows the image. In the paper's 1000 steps it is 4e-5.
VISIBLE_SNR = 1e-3
# The two groups are the experiment's name and the start time.
RUN_NAME = re.compile(r"(.+)-(\d{8}-\d{6})")
# Earlier versions wrote .pt files. The pattern matches them too, so that they are refused with a
# message instead of being overlooked.
CHECKPOINT_NAME = re.compile(r"step-\d{8}\.(safetensors|pt)")
# The trained models that come with the repository. They are read when there is no run.
PRETRAINED = Path(__file__).resolve().parents[2] / "pretrained"


@dataclass(frozen=True)
class Facts:
    """The facts that a run finds at its start, for config.json and each checkpoint."""

    total_steps: int = 0
    steps_per_epoch: int = 0
    # This describes the split. Each hash is over the ids of the images in one part.
    split: str = ""
    train_ids_hash: str = ""
    val_ids_hash: str = ""
    # The network has this number of parameters.
    parameters: int = 0
    terminal_snr: float = 0.0
    device: str = ""
    # This describes the model whose weights the run started from. None means random weights.
    initial: str | None = None
    # The bits of the results depend on these values: precision, threads, versions, ...
    arithmetic: dict = field(default_factory=dict)

    @staticmethod
    def of(checkpoint: TensorFile) -> "Facts":
        """Return the facts in a checkpoint. Facts that an old checkpoint lacks get defaults."""
        contents = checkpoint.contents["run"]
        defaults = vars(Facts())
        return Facts(**{name: contents.get(name, defaults[name]) for name in defaults})


@dataclass
class Run:
    """A run: its experiment, its folder and its state at the start."""

    # This is the name of the experiment.
    name: str
    # The experiment contains all settings that change the result.
    experiment: Experiment
    # `make_folder` makes the run's folder in runs_folder. Until then `folder` is None.
    runs_folder: Path
    folder: Path | None = None
    # A resumed run continues from this checkpoint.
    checkpoint: TensorFile | None = None
    # For a resumed run, these are the facts in its checkpoint. For a new run, only `initial` may be
    # set.
    prior_facts: Facts = Facts()
    # A new run may start from the weights of this model.
    initial: SavedModel | None = None

    @property
    def first_step(self) -> int:
        """Return the number of steps that earlier sessions of the run have done."""
        return self.checkpoint.contents["run"]["step"] if self.checkpoint else 0

    def make_folder(self) -> None:
        """Make the run's folder, unless it exists already, and its subfolders."""
        self.runs_folder.mkdir(parents=True, exist_ok=True)
        while self.folder is None:
            folder = self.runs_folder / f"{self.name}-{time.strftime('%Y%m%d-%H%M%S')}"
            try:
                folder.mkdir()
                self.folder = folder
            except FileExistsError:
                # Another run has started within the same second.
                time.sleep(0.2)
        for inner in ("samples", "checkpoints", "snapshots"):
            (self.folder / inner).mkdir(exist_ok=True)

    def path_of(self, kind: str, step: int) -> Path:
        """Return the path of a step's file. `kind` is "checkpoints", "snapshots" or "samples"."""
        extension = "png" if kind == "samples" else "safetensors"
        return self.folder / kind / f"step-{step:08d}.{extension}"

    def write_config(self, facts: Facts) -> str:
        """Write config.json, and return its text.

        The file contains the config as a checkpoint does, and the facts as `run`.
        """
        config = {"experiment": self.name, **self.experiment.to_dict(), "run": vars(facts)}
        text = json.dumps(config, indent=2)
        write_text(self.folder / "config.json", text)
        return text


def describe(run: Run, facts: Facts, data_summary: str) -> str:
    """Describe a run in a few lines (data, split, network, ...), followed by warnings."""
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
        f"  objective  {config.objective} over {config.timesteps_diff} "
        f"timesteps with {config.beta_schedule} betas, terminal SNR {snr:.2g}"
    )

    # A parameter takes 2 bytes in float16.
    megabytes = 2 * facts.parameters / 1e6
    if config.snapshot_every:
        count = math.ceil(facts.total_steps / config.snapshot_every)
        lines.append(f"  snapshots  {count:,} of {megabytes:,.1f} MB each")

    warnings = run.experiment.warnings()
    if snr > VISIBLE_SNR:
        warnings.append(
            f"terminal SNR {snr:.2g} (sqrt(alpha_bar_T) = {math.sqrt(snr / (1 + snr)):.3f}): x_T "
            "still carries the image, but sampling starts from pure noise; "
            "set rescale_betas = True or use 1000 timesteps"
        )
    if config.ema_decay == 0:
        warnings.append("ema_decay is 0: no EMA, samples use the raw weights")
    # A resumed run equals an uninterrupted one bit for bit only in the same arithmetic.
    for name, previous in run.prior_facts.arithmetic.items():
        current = facts.arithmetic.get(name)
        if previous != current:
            warnings.append(
                f"{name} was {previous}, is now {current}: no longer bit for bit like an "
                "uninterrupted run"
            )
    lines.extend(f"warning: {warning}" for warning in warnings)
    return "\n".join(lines)


@contextmanager
def locked(
    folder: Path, activity: str = "training", leftovers: str = "**/.*.tmp"
) -> Iterator[None]:
    """Lock a folder for one process, and delete the files that match the pattern `leftovers`.

    A process that is killed while it writes leaves such files. Raises UserError, which names the
    `activity`, when another process has locked the folder.
    """
    # The system releases the lock when the process ends, even when it is killed.
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(
            f"{folder}: another process is already {activity} in this folder"
        ) from error
    except (NotImplementedError, OSError):
        print(
            f"warning: {folder} is on a disk without locks; do not start another process in it",
            file=sys.stderr,
        )
    try:
        for leftover in folder.glob(leftovers):
            leftover.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def checkpoints_of(run: Path, folder: str = "checkpoints") -> list[Path]:
    """Return the run's checkpoints, or its "snapshots", oldest first."""
    paths = (run / folder).glob("*")
    return sorted(path for path in paths if CHECKPOINT_NAME.fullmatch(path.name))


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.stem.removeprefix("step-"))


def delete_old(run: Path, last_step: int, count: int, every: int) -> None:
    """Delete checkpoints, except the `count` newest and those at multiples of `every` steps.

    If `every` is 0, only the newest are kept.
    """
    # Checkpoints after `last_step` are damaged, and the resumed run will overwrite them. So they do
    # not count as the newest.
    checkpoints = [path for path in checkpoints_of(run) if step_of(path) <= last_step]
    for path in checkpoints[:-count]:
        if every == 0 or step_of(path) % every:
            # The calibrations of a checkpoint are deleted with it.
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
    """Return the checkpoints, newest first, of the newest run that has one.

    If no run has one, return the models in PRETRAINED, and print that they are used. They replace
    neither the runs of a certain experiment nor those of a folder that the user names. Raises
    CheckpointError when there is neither a checkpoint nor such a model.
    """
    for run in reversed(runs_of(runs, prefix)):
        if checkpoints_of(run):
            return find_checkpoints(run)
    target = f"run of an experiment {prefix}*" if prefix else "run"
    flag = "" if runs == Path("runs") else f" --runs {runs}"
    folder = PRETRAINED
    # Seen from the repository's folder, messages have the short path pretrained/NAME.safetensors.
    with suppress(ValueError):
        folder = folder.relative_to(Path.cwd())
    # A calibration is written next to its model.
    boxed = [path for path in folder.glob("*.safetensors") if "-calibration-" not in path.name]
    if boxed and not prefix and not flag:
        print(
            f"{runs}: no run with a checkpoint here yet; using a model that comes with the "
            "repository (train your own: python train.py)"
        )
        return sorted(boxed)
    command = "" if prefix else f" (python train.py{flag})"
    raise CheckpointError(
        f"{runs}: no {target} with a checkpoint here yet; "
        f"train one first{command}, or name a checkpoint"
    )


def results_folder(saved: SavedModel, kind: str) -> Path:
    """Return the folder for results of a kind: in a checkpoint's run, or next to an export."""
    # Nothing is written to a diffusers folder, so the results of its model go into a new folder.
    if saved.path.is_dir():
        return Path("samples") / f"{saved.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = saved.path.parent
    if folder.name in ("checkpoints", "snapshots"):
        folder = folder.parent
    return folder / kind


def find_checkpoints(path: Path) -> list[Path]:
    """Return the checkpoints of a run folder, newest first.

    For a file or a diffusers folder, return its path. Raises CheckpointError for any other folder.
    """
    checkpoints = checkpoints_of(path)
    if checkpoints:
        return checkpoints[::-1]
    if path.is_dir() and not is_diffusers_folder(path):
        raise CheckpointError(
            f"{path}: no checkpoint in this folder (a run folder has them in checkpoints/)"
        )
    return [path]


def first_intact(candidates: Sequence[Path], read: Callable[[Path], Result]) -> Result:
    """Return the value of `read` for the first checkpoint that it can read.

    Print a loud warning for each damaged checkpoint. If all are damaged, raise the last one's
    error.
    """
    for path, next_path in pairwise(candidates):
        try:
            return read(path)
        except CheckpointError as error:
            print(
                f"WARNING: DAMAGED CHECKPOINT: {error}. Using the one before it: {next_path}",
                file=sys.stderr,
            )
    return read(candidates[-1])


def last_checkpoint(run: Path) -> str:
    """Return the path of the newest checkpoint whose checksums are right, for a message."""
    with suppress(CheckpointError):
        return str(first_intact(find_checkpoints(run), verify_checkpoint).path)
    return "there is none yet"


def run_to_resume(resume: str | None, runs: Path, experiment: str) -> Path | None:
    """Return the folder of the run to resume, or None to start a new run.

    `resume` is one of these:

        None           a new run
        "newest"       the newest run of the experiment that has a checkpoint and has not reached
                       its last step
        "auto"         the same, or a new run if there is none
        a run's folder

    Raises UserError when there is no such run, and CheckpointError when all checkpoints of a run
    are damaged.
    """
    if resume is None:
        return None
    if resume not in ("newest", "auto"):
        # A user may give a checkpoint file, which is not a run folder.
        if not Path(resume).is_dir():
            raise UserError(
                f"{resume} is not a run folder; "
                "`NAME --resume` resumes the newest unfinished run of NAME"
            )
        return Path(resume)
    for run in reversed(runs_of(runs, experiment)):
        # Another experiment's name may begin with this one's.
        if RUN_NAME.fullmatch(run.name)[1] == experiment and checkpoints_of(run):
            checkpoint = first_intact(find_checkpoints(run), open_checkpoint)
            facts = checkpoint.contents["run"]
            if facts["step"] < facts["total_steps"]:
                return run
    problem = f"{runs}: no unfinished run of {experiment!r} with a checkpoint"
    if resume == "newest":
        raise UserError(f"{problem}; start one without --resume")
    print(f"WARNING: NOTHING TO RESUME ({problem}). STARTING A NEW RUN.", file=sys.stderr)
    return None
