"""Run folders: what is found, what is kept, and that no two runs share one."""

import time
from unittest.mock import Mock

import pytest
import torch

from functions.sampling.settings import newest_run
from functions.saved import checkpoint, run_folder
from functions.saved.checkpoint import write_tensors
from functions.saved.run_folder import checkpoints_of, path_of
from functions.support.errors import CheckpointError, UserError
from functions.training import resuming
from functions.training.resuming import locked, run_to_resume
from tests.conftest import linux, posix, refused, rights_of_others

FACES = "faces-20260101-000000"


def make_run(runs, name, *steps):
    """Make a run folder of 100 steps with a checkpoint of each of these."""
    run = runs / name
    for folder in ("checkpoints", "samples", "snapshots"):
        (run / folder).mkdir(parents=True, exist_ok=True)
    for step in steps:
        # The name ends in a date and a time, which are 16 characters with their dashes.
        facts = {"experiment": name[:-16], "step": step, "total_steps": 100}
        contents = {"config": {"diffusion": {}, "model": {}}, "run": facts}
        write_tensors(path_of(run, "checkpoints", step), {"model": {"a": torch.ones(1)}}, contents)
    return run


def test_the_newest_run_and_its_newest_checkpoint_are_found(tmp_path, capsys):
    done = make_run(tmp_path, FACES, 100)
    unfinished = make_run(tmp_path, "ffhq-full-20260102-000000", 50, 9, 60)
    make_run(tmp_path, "ffhq-run1-20250101-000000", 100)
    # This one has just started.
    new = make_run(tmp_path, "faces-20260103-000000")
    (tmp_path / "notes").mkdir()

    assert newest_run(tmp_path) == unfinished
    assert newest_run(tmp_path, "faces") == done
    assert resuming.last_checkpoint(unfinished) == path_of(unfinished, "checkpoints", 60)
    assert resuming.last_checkpoint(new) is None

    assert run_to_resume(True, tmp_path, "ffhq-full") == unfinished
    # "ffhq" is no experiment, but a prefix of two.
    for finished in ("faces", "ffhq", "ffhq-run1"):
        assert run_to_resume("auto", tmp_path, finished) is None
        assert "WARNING: NOTHING TO RESUME" in capsys.readouterr().err
    with refused(f"no unfinished run .* longer: --resume {done} --diffusion.epochs N;"):
        run_to_resume(True, tmp_path, "faces")

    with refused("no run", CheckpointError):
        newest_run(tmp_path / "missing")


def test_a_finished_run_whose_last_checkpoint_is_damaged_goes_on_from_the_one_before(
    tmp_path, capsys
):
    """If none can be read there is an error, and no new run."""
    run = make_run(tmp_path, FACES, 50, 100)
    before, last = checkpoints_of(run)
    whole = last.read_bytes()
    # The tensor is at the end of the file, and is read of a run that is named.
    last.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert run_to_resume("auto", tmp_path, "faces") is None
    assert run_to_resume(str(run), tmp_path, "faces") == run
    capsys.readouterr()

    last.write_bytes(whole[:100])
    assert run_to_resume("auto", tmp_path, "faces") == run
    assert capsys.readouterr().err.count(f"WARNING: UNUSABLE CHECKPOINT: {last}") == 1
    before.write_bytes(b"")
    with refused(f"{before}: the file is truncated", CheckpointError):
        run_to_resume("auto", tmp_path, "faces")


@linux
@pytest.mark.parametrize("closed", ["", f"{FACES}/checkpoints"])
def test_a_folder_that_cannot_be_read_never_leads_to_a_new_run(tmp_path, closed):
    make_run(tmp_path / "runs", FACES, 50)
    folder = tmp_path / "runs" / closed
    folder.chmod(0o300)
    with rights_of_others(), pytest.raises(PermissionError, match=folder.name):
        run_to_resume("auto", tmp_path / "runs", "faces")


@posix
@pytest.mark.parametrize("kind", ["link", "file"])
@pytest.mark.parametrize("place", ["", f"more/{FACES}", f"more/{FACES}/checkpoints"])
def test_resume_auto_never_begins_anew_over_a_link_to_nothing_or_a_file(tmp_path, place, kind):
    """Of a link, also what is below it is away."""
    make_run(tmp_path / "runs" / "more", FACES, 50)
    path = tmp_path / "runs" / place
    path.rename(tmp_path / "away")
    sentence = "Not a directory"
    if kind == "file":
        path.touch()
    else:
        path.symlink_to("disk")
        sentence = f"^{path} is a link to disk, which is not there"
    for call in (
        lambda: run_to_resume("auto", tmp_path / "runs" / "more", "faces"),
        lambda: run_folder.new_folder(path / "sub"),
    ):
        with pytest.raises((UserError, NotADirectoryError), match=sentence):
            call()


@linux
@pytest.mark.parametrize("error", [PermissionError, MemoryError, FileNotFoundError])
def test_an_intact_checkpoint_that_cannot_be_read_now_is_not_passed_over(
    error, tmp_path, monkeypatch
):
    """If it were, the resumed run would overwrite it."""
    run = make_run(tmp_path, FACES, 50)
    make_run(tmp_path, FACES, 60)
    newest = checkpoints_of(run)[-1]
    if error is PermissionError:
        newest.chmod(0)
    if error is FileNotFoundError:
        # The disk of the link is not there.
        newest.unlink()
        newest.symlink_to(tmp_path / "disk" / newest.name)
    if error is MemoryError:
        monkeypatch.setattr(checkpoint, "safe_open", Mock(side_effect=MemoryError))
    with rights_of_others():
        with pytest.raises(error):
            run_to_resume("auto", tmp_path, "faces")
        assert resuming.last_checkpoint(run) is None


@posix
def test_a_run_folder_is_never_used_twice_and_has_its_time_in_utc(tmp_path, monkeypatch):
    folders = []
    # The clocks of the second zone are 24 hours behind those of the first.
    for zone in ("EAST-12", "WEST+12"):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        folders.append(run_folder.new_folder(tmp_path, "faces"))
    monkeypatch.undo()
    time.tzset()
    assert run_folder.runs_of(tmp_path) == folders


def test_a_lock_deletes_what_a_killed_training_left_and_no_more(tmp_path):
    run = make_run(tmp_path, FACES)
    # The last but one is safetensors' own.
    names = (".config.json.1.tmp", "samples/.step-00000010.png.1.tmp", "checkpoints/.tmp6f5Nct")
    for name in (*names, "metrics.csv"):
        (run / name).touch()
    with locked(run):
        assert {path.name for path in run.rglob("*") if path.is_file()} == {".lock", "metrics.csv"}


def test_the_newest_checkpoints_are_kept(tmp_path):
    """Those beyond the step that was reached are no reason to delete another."""
    run = make_run(tmp_path, FACES, *range(10, 70, 10))
    resuming.delete_old(run, last_step=40, count=2)
    steps = [run_folder.step_of(path) for path in checkpoints_of(run)]
    assert steps == [30, 40, 50, 60]
