"""Stop a run so that nothing is lost, and find the run to resume and its newest checkpoint."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import Timeout

from functions.saved.checkpoint import Checkpoint, verify_checkpoint
from functions.saved.run_folder import (
    RUN_NAME,
    checkpoints_of,
    find_checkpoints,
    first_intact,
    runs_of,
    step_of,
)
from functions.support.errors import WRITE_ERRORS, UserError, quoted, warn
from functions.support.files import holding

# A training that is killed while it writes leaves such files in its run folder. The last ones are
# those of safetensors.
TRAINING_LEFTOVERS = (".*.tmp", "*/.*.tmp", "*/.tmp*")
# A terminal that is closed sends SIGHUP. Windows has neither it nor SIGUSR1.
SIGNAL_NAMES = ("SIGHUP", "SIGINT", "SIGTERM", "SIGUSR1")
SIGNALS = [number for number in signal.Signals if number.name in SIGNAL_NAMES]


def run_to_resume(resume: str | bool, runs: Path, experiment: str) -> Path | None:
    """Return the folder of the run to resume, which has a checkpoint; or None to start a new run.

    `resume` is one of these:

        False          a new run
        True           the newest run of the experiment that has a checkpoint and has not reached
                       its last step
        "auto"         the same, or a new run if there is none
        a run's folder

    Raises UserError when there is no such run, and CheckpointError when no checkpoint of a run can
    be read.
    """
    if resume is False:
        return None
    if resume not in (True, "auto"):
        # A user may give a checkpoint file, which is not a run folder.
        if Path(resume).is_file() or not checkpoints_of(Path(resume)):
            raise UserError(
                f"{resume} is not a run folder with a checkpoint; "
                "`NAME --resume` resumes the newest unfinished run of NAME"
            )
        return Path(resume)
    finished = None
    for run in reversed(runs_of(runs, experiment)):
        # Another experiment's name may begin with this one's.
        if RUN_NAME.fullmatch(run.name)[1] != experiment or not checkpoints_of(run):
            continue
        # Tensors of the chosen run alone are read: those of all older ones would take minutes.
        done = first_intact(find_checkpoints(run), Checkpoint).contents["run"]
        if done["step"] < done["total_steps"]:
            return run
        finished = finished or run
    problem = f"{runs}: no unfinished run of {experiment!r} with a checkpoint"
    if finished:
        problem += (
            f"; to train a finished one longer: --resume {quoted(finished)} --diffusion.epochs N"
        )
    if resume is True:
        raise UserError(f"{problem}; start a new one without --resume")
    warn(f"WARNING: NOTHING TO RESUME ({problem}). STARTING A NEW RUN.")
    return None


def resume_command(run: Path) -> str:
    """Return the command that continues a run, for messages."""
    return f"python train.py --resume {quoted(run)}"


def intact_checkpoint(run: Path) -> Checkpoint:
    """Open the newest checkpoint whose checksums are right."""
    return first_intact(find_checkpoints(run), verify_checkpoint)


def last_checkpoint(run: Path) -> Path | None:
    """Return the path of the newest checkpoint whose checksums are right, if there is one."""
    with suppress(UserError, OSError, MemoryError):
        return intact_checkpoint(run).path
    return None


def delete_old(run: Path, last_step: int, count: int) -> None:
    """Delete checkpoints except the `count` newest."""
    # Checkpoints after `last_step` are damaged, and the resumed run will overwrite them. So they do
    # not count as the newest.
    checkpoints = [path for path in checkpoints_of(run) if step_of(path) <= last_step]
    for path in checkpoints[:-count]:
        path.unlink()


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Lock a run for one process, and delete the incomplete files that a kill has left in it.

    Raises UserError when another process has locked it, and OSError when it is read-only.
    """
    advice = "do not start another process in it"
    with ExitStack() as stack:
        try:
            stack.enter_context(holding(run / ".lock", advice))
        except Timeout as error:
            raise UserError(f"{run}: another process is already training in this folder") from error
        for pattern in TRAINING_LEFTOVERS:
            for leftover in filter(Path.is_file, run.glob(pattern)):
                leftover.unlink()
        yield


class StopSignals:
    """A context in which the first signal of each kind sets `received`, and ends nothing.

    A second one of the same kind does what it did before. Only the main thread can enter it.
    A terminal that is closed takes no more output, so this goes nowhere then.
    """

    # The name of the last signal.
    received: str | None = None

    def __enter__(self) -> "StopSignals":
        self.terminals = [stream.fileno() for stream in (sys.stdout, sys.stderr) if stream.isatty()]
        # nohup lets a process ignore SIGHUP, which then stays ignored. A script's background jobs
        # ignore SIGINT, but whoever sends that to one of them means it.
        self.previous = {
            number: signal.signal(number, self.receive)
            for number in SIGNALS
            if (number.name, signal.getsignal(number)) != ("SIGHUP", signal.SIG_IGN)
        }
        return self

    def __exit__(self, *_: Any) -> None:
        for number, previous in self.previous.items():
            signal.signal(number, previous)

    def receive(self, number: int, _: FrameType | None) -> None:
        """Remember the signal, and put back what it did before."""
        self.received = signal.Signals(number).name
        signal.signal(number, self.previous[number])
        if self.received == "SIGHUP":
            with open(os.devnull, "w") as nowhere:
                for terminal in self.terminals:
                    os.dup2(nowhere.fileno(), terminal)


@contextmanager
def explain_failed_writes(run: Path, how_to_resume: str) -> Iterator[None]:
    """Turn an OSError of the disk, but no other, into a UserError with the last checkpoint."""
    try:
        yield
    except OSError as error:
        if error.errno not in WRITE_ERRORS:
            raise
        checkpoint = last_checkpoint(run)
        advice = "There is no checkpoint yet"
        if checkpoint:
            advice = (
                f"Last good checkpoint: {checkpoint}. "
                f"Once you have fixed this, continue with: {how_to_resume}"
            )
        raise UserError(
            f"{error.filename or run} cannot be written to: {error.strerror or error}. {advice}"
        ) from error
