"""Run folders: runs/<experiment>-<YYYYMMDD-HHMMSS>/ with everything about one run.

config.json     the experiment, field by field, and what the run found: split, device, precision, versions
metrics.csv     one row every `log_every` steps; the same numbers as TensorBoard events in tensorboard/
losses.png      the curves of metrics.csv
samples/        grids made while training, by step
checkpoints/    step-00001000.pt, ...
"""

import json
import re
import time
from pathlib import Path

from functions.checkpoint import CheckpointError, write_whole

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


def keep_newest(run: Path, count: int) -> None:
    """Delete all but the run's `count` newest checkpoints."""
    for path in checkpoints_of(run)[:-count]:
        path.unlink()


def runs_of(runs: Path, prefix: str = "") -> list[Path]:
    """Run folders of experiments whose names start with `prefix`, oldest first."""
    found = [(RUN_NAME.fullmatch(path.name), path) for path in runs.glob("*/")] if runs.is_dir() else []
    named = [(match["time"], path) for match, path in found if match and match["experiment"].startswith(prefix)]
    return [path for _, path in sorted(named)]


def newest_checkpoint(runs: Path, prefix: str = "") -> Path:
    """The newest checkpoint of the newest run that has one.

    Raises:
        CheckpointError: there is none.
    """
    for run in reversed(runs_of(runs, prefix)):
        if checkpoints_of(run):
            return checkpoints_of(run)[-1]
    what = f"run of an experiment {prefix}*" if prefix else "run"
    raise CheckpointError(f"{runs}: no {what} with a checkpoint here yet; train one first, or name a checkpoint")


def find_checkpoint(path: Path) -> Path:
    """A checkpoint file as it is, or a run folder's newest checkpoint.

    Raises:
        CheckpointError: nothing there, or a folder without checkpoints.
    """
    if path.is_dir():
        found = checkpoints_of(path)
        if not found:
            raise CheckpointError(f"{path}: no checkpoint in this folder (a run folder has them in checkpoints/)")
        return found[-1]
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file or folder")
    return path


def newest_unfinished(runs: Path, experiment: str) -> Path:
    """The newest run of exactly this experiment that has a checkpoint and has not reached its last step.

    Raises:
        CheckpointError: there is none.
    """
    for run in reversed(runs_of(runs, experiment)):
        if RUN_NAME.fullmatch(run.name)["experiment"] != experiment or not checkpoints_of(run):
            continue
        if step_of(checkpoints_of(run)[-1]) < read_config(run)["run"]["total_steps"]:
            return run
    raise CheckpointError(f"{runs}: no unfinished run of {experiment!r} with a checkpoint; start one without --resume")


def write_config(run: Path, experiment: str, config: dict, facts: dict) -> None:
    """config.json: the config as in a checkpoint, and under `run` what was found when it started."""
    text = json.dumps({"experiment": experiment, **config, "run": facts}, indent=2)
    write_whole(run / "config.json", lambda file: file.write(text.encode()))


def read_config(run: Path) -> dict:
    """The content of config.json; `CheckpointError` when it is missing or damaged, or `run` is no run folder."""
    if not run.is_dir():
        raise CheckpointError(f"{run} is not a run folder; `NAME --resume` takes the newest unfinished run of NAME")
    try:
        contents = json.loads((run / "config.json").read_text())
        contents["experiment"], contents["run"]["total_steps"]  # they must be there
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{run / 'config.json'}: missing or damaged, so this is not a usable run") from error
    return contents
