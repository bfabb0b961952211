"""Run folders: what is found, what is kept, and that no two runs have the same. Their lock: test_survival.py."""

import pytest
import torch

from functions.support import run_folder
from functions.support.errors import CheckpointError
from functions.support.files import write_tensors


def make_run(runs, name, steps, total=100):
    (runs / name / "checkpoints").mkdir(parents=True)
    for step in steps:
        stands = {"experiment": name[:-16], "step": step, "total_steps": total}
        contents = {"config": {}, "run": stands, "scaler": {}}
        write_tensors(
            runs / name / "checkpoints" / f"step-{step:08d}.safetensors",
            {"a": torch.zeros(1)},
            contents,
        )


def test_the_newest_run_and_its_newest_checkpoint_are_found(tmp_path):
    make_run(tmp_path, "faces-20260101-000000", [100])
    make_run(tmp_path, "ffhq-full-20260102-000000", [50, 9, 60])
    make_run(tmp_path, "ffhq-run1-20250101-000000", [100])
    make_run(tmp_path, "faces-20260103-000000", [])  # just started
    (tmp_path / "notes").mkdir()
    (
        tmp_path / "ffhq-full-20260102-000000" / "checkpoints" / ".step-00000070.safetensors.1.tmp"
    ).touch()
    newest, *others = run_folder.newest_checkpoints(tmp_path)
    assert [run_folder.step_of(path) for path in others] == [50, 9]
    assert (
        newest
        == tmp_path / "ffhq-full-20260102-000000" / "checkpoints" / "step-00000060.safetensors"
    )
    assert (
        run_folder.newest_checkpoints(tmp_path, "faces")[0].parent.parent.name
        == "faces-20260101-000000"
    )
    assert (
        run_folder.run_to_resume("newest", tmp_path, "ffhq-full").name
        == "ffhq-full-20260102-000000"
    )
    for finished in ("faces", "ffhq", "ffhq-run1"):  # "ffhq" is a prefix, not an experiment
        assert run_folder.run_to_resume("auto", tmp_path, finished) is None
    with pytest.raises(CheckpointError, match="cifar"):
        run_folder.newest_checkpoints(tmp_path, "cifar")
    with pytest.raises(CheckpointError, match="no run"):
        run_folder.newest_checkpoints(tmp_path / "missing")


def test_a_run_of_an_earlier_version_is_refused_and_not_passed_over(tmp_path):
    """Of `.pt` files: nobody wants the run before it, or a new one."""
    make_run(tmp_path, "faces-20260101-000000", [50])
    make_run(tmp_path, "faces-20260102-000000", [])
    torch.save({}, tmp_path / "faces-20260102-000000" / "checkpoints" / "step-00000005.pt")
    with pytest.raises(CheckpointError, match=r"00000005\.pt: .*not a checkpoint of this version"):
        run_folder.run_to_resume("auto", tmp_path, "faces")


def test_a_run_folder_is_never_used_twice(tmp_path):
    first, second = (run_folder.Run("faces", None, tmp_path) for _ in range(2))
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
        # What lies beyond the step that was reached is no reason to delete another
        (2, 0, 40, [30, 40, 50, 60]),
    ],
)
def test_the_newest_checkpoints_and_every_nth_are_kept(tmp_path, count, every, done, kept):
    make_run(tmp_path, "faces-20260101-000000", range(10, 70, 10))
    (run,) = tmp_path.iterdir()
    deleted = set(range(10, 70, 10)) - set(kept)
    beside = {
        step: run / "checkpoints" / f"step-{step:08d}-calibration-own.safetensors"
        for step in range(10, 70, 10)
    }
    others = [
        path.with_name(path.name.replace("calibration-own", "mine")) for path in beside.values()
    ]
    for path in (*beside.values(), *others):
        path.touch()
    run_folder.delete_old(run, done, count, every)
    # And what is not ours stays
    assert {step for step, path in beside.items() if not path.exists()} == deleted
    assert all(path.exists() for path in others)
    assert [run_folder.step_of(path) for path in run_folder.checkpoints_of(run)] == kept
