"""Find the run to resume, its newest intact checkpoint, and the lock of its folder."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

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
from functions.support.errors import UserError, quoted, warn
from functions.support.files import holding

# A training that is killed while it writes leaves such files in its run folder. The last ones are
# those of safetensors.
TRAINING_LEFTOVERS = (".*.tmp", "*/.*.tmp", "*/.tmp*")


def run_to_resume(resume: str | None, runs: Path, experiment: str) -> Path | None:
    """Return the folder of the run to resume, which has a checkpoint; or None to start a new run.

    `resume` is one of these:

        None           a new run
        "newest"       the newest run of the experiment that has a checkpoint and has not reached
                       its last step
        "auto"         the same, or a new run if there is none
        a run's folder

    Raises UserError when there is no such run, and CheckpointError when no checkpoint of a run can
    be read.
    """
    if resume is None:
        return None
    if resume not in ("newest", "auto"):
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
    if resume == "newest":
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
            stack.enter_context(holding(run / ".lock", advice, timeout=0))
        except Timeout as error:
            raise UserError(f"{run}: another process is already training in this folder") from error
        for pattern in TRAINING_LEFTOVERS:
            for leftover in filter(Path.is_file, run.glob(pattern)):
                leftover.unlink()
        yield
