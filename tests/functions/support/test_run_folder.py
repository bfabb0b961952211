"""Run folders: what is found, what is kept, and that no two runs share one.

Tests of a folder's lock are in test_survival.py.
"""

import pytest
import torch

from functions.support import run_folder
from functions.support.errors import CheckpointError
from functions.support.files import write_tensors


def make_run(runs, name, steps, total=100):
    """Make a run folder with a checkpoint of each of these steps."""
    folder = runs / name / "checkpoints"
    folder.mkdir(parents=True)
    for step in steps:
        # The name ends in a date and a time, which are 16 characters with their dashes.
        run = {"experiment": name[:-16], "step": step, "total_steps": total}
        contents = {"config": {}, "run": run, "scaler": {}}
        path = folder / f"step-{step:08d}.safetensors"
        write_tensors(path, {"a": torch.zeros(1)}, contents)


def test_the_newest_run_and_its_newest_checkpoint_are_found(tmp_path):
    make_run(tmp_path, "faces-20260101-000000", [100])
    make_run(tmp_path, "ffhq-full-20260102-000000", [50, 9, 60])
    make_run(tmp_path, "ffhq-run1-20250101-000000", [100])
    # This one has just started.
    make_run(tmp_path, "faces-20260103-000000", [])
    (tmp_path / "notes").mkdir()
    unfinished = tmp_path / "ffhq-full-20260102-000000"
    # A process that was killed has left half a file.
    (unfinished / "checkpoints" / ".step-00000070.safetensors.1.tmp").touch()

    newest, *others = run_folder.newest_checkpoints(tmp_path)
    assert newest == unfinished / "checkpoints" / "step-00000060.safetensors"
    assert [run_folder.step_of(path) for path in others] == [50, 9]
    of_faces = run_folder.newest_checkpoints(tmp_path, "faces")[0]
    assert of_faces.parent.parent.name == "faces-20260101-000000"

    assert run_folder.run_to_resume("newest", tmp_path, "ffhq-full").name == unfinished.name
    # "ffhq" is no experiment, but a prefix of two.
    for finished in ("faces", "ffhq", "ffhq-run1"):
        assert run_folder.run_to_resume("auto", tmp_path, finished) is None

    with pytest.raises(CheckpointError, match="cifar"):
        run_folder.newest_checkpoints(tmp_path, "cifar")
    with pytest.raises(CheckpointError, match="no run"):
        run_folder.newest_checkpoints(tmp_path / "missing")


def test_a_run_of_an_earlier_version_is_refused_and_not_passed_over(tmp_path):
    """Its checkpoints are `.pt` files. Nobody wants the run before it instead, or a new one."""
    make_run(tmp_path, "faces-20260101-000000", [50])
    make_run(tmp_path, "faces-20260102-000000", [])
    torch.save({}, tmp_path / "faces-20260102-000000" / "checkpoints" / "step-00000005.pt")

    with pytest.raises(CheckpointError, match=r"00000005\.pt: .*not a checkpoint of this version"):
        run_folder.run_to_resume("auto", tmp_path, "faces")


def test_a_run_folder_is_never_used_twice(tmp_path):
    first = run_folder.Run("faces", None, tmp_path)
    second = run_folder.Run("faces", None, tmp_path)

    first.make_folder()
    second.make_folder()
    assert run_folder.runs_of(tmp_path) == [first.folder, second.folder]


@pytest.mark.parametrize(
    ("count", "every", "done", "kept"),
    [
        (2, 0, 60, [50, 60]),
        (1, 20, 60, [20, 40, 60]),
        (1, 0, 60, [60]),
        (9, 0, 60, [10, 20, 30, 40, 50, 60]),
        # Checkpoints beyond the step that was reached are no reason to delete another.
        (2, 0, 40, [30, 40, 50, 60]),
    ],
)
def test_the_newest_checkpoints_and_every_nth_are_kept(tmp_path, count, every, done, kept):
    steps = range(10, 70, 10)
    make_run(tmp_path, "faces-20260101-000000", steps)
    (run,) = tmp_path.iterdir()
    calibrations = {}
    files_of_users = []
    for step in steps:
        start = f"step-{step:08d}"
        calibrations[step] = run / "checkpoints" / f"{start}-calibration-own.safetensors"
        calibrations[step].touch()
        files_of_users.append(run / "checkpoints" / f"{start}-mine.safetensors")
        files_of_users[-1].touch()

    run_folder.delete_old(run, done, count, every)

    assert [run_folder.step_of(path) for path in run_folder.checkpoints_of(run)] == kept
    assert [step for step in steps if calibrations[step].exists()] == kept
    # What a user has put beside them stays.
    assert all(path.exists() for path in files_of_users)
