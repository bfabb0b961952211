"""What a resumed run keeps, what it may change, and what it says of the rest."""

import json
import shutil
from contextlib import nullcontext

import pytest
import torch

import train
from config import ConfigError
from functions.support.errors import UserError
from functions.support.run_folder import checkpoints_of
from functions.training.metrics import read_metrics
from tests.conftest import call, during, interrupt, newest, posix, terminate
from tests.kill import assert_same_run, sample_grids
from tests.spoilt_files import same


@pytest.mark.slow
@posix
def test_what_a_resumed_run_may_change(unfinished, capsys):
    """A run that is made longer, and interrupted before its next checkpoint, remembers its length.

    Its newest checkpoint has it already, so it goes on without being told again.
    """
    for refused, message in {
        "--diffusion.optimizer muon --model.base-dim 16": "diffusion.optimizer, model.base_dim",
        "--diffusion.batch-size 4": "cannot change diffusion.batch_size",
        # It has done 7 steps, and an epoch has five.
        "--diffusion.epochs 1": "the run is finished",
        "ffhq-full": "a run of 'faces', not of 'ffhq-full'",
    }.items():
        with pytest.raises(ConfigError, match=message):
            call(train.main, *refused.split(), "--resume", unfinished)
    capsys.readouterr()

    # The effective batch stays the same, so this is allowed.
    with pytest.raises(KeyboardInterrupt), during(1, interrupt):
        changes = "--diffusion.batch-size 4 --diffusion.gradient-accumulation 2"
        call(train.main, "--resume", unfinished, *changes.split(), "--diffusion.epochs", 3)
    printed = capsys.readouterr().out
    assert "changed: diffusion.epochs was 2, is now 3" in printed
    assert "changed: diffusion.batch_size was 8, is now 4" in printed
    assert "warning: batch_size was 8, is now 4: no longer bit for bit" in printed

    # It goes on to the end of three epochs, each of five steps.
    call(train.main, "faces", "--resume", "auto", "--runs", unfinished.parent)
    assert newest(unfinished)["run"]["step"] == 15
    rows = read_metrics(unfinished / "metrics.csv")
    assert [row["step"] for row in rows] == [2, 4, 5, 6, 8, 10, 12, 14, 15]
    assert json.loads((unfinished / "config.json").read_text())["diffusion"]["epochs"] == 3
    with pytest.raises(ConfigError, match="finished"):
        call(train.main, "--resume", unfinished)


def test_resuming_keeps_precision_and_says_what_it_cannot_keep(unfinished, monkeypatch, capsys):
    """The run is in float32, and "auto" would be bfloat16 here."""
    monkeypatch.setattr("functions.support.device.cpu_has_bfloat16", lambda: True)
    resume = ["--resume", unfinished, "--dry-run", "--diffusion.precision", "auto"]
    call(train.main, *resume)
    printed = capsys.readouterr().out
    assert "parameters, float32, cpu" in printed
    assert "no longer bit for bit" not in printed

    # Another number of threads adds in another order.
    torch.set_num_threads(2)
    call(train.main, *resume)
    warning = "warning: threads was 1, is now 2: no longer bit for bit like an uninterrupted run"
    assert warning in capsys.readouterr().out


@pytest.mark.slow
def test_deterministic_kernels_are_asked_for_and_only_then(trained):
    for value in ("true", "false"):
        trained("--dry-run", "--diffusion.deterministic", value)
        wanted = value == "true"
        assert torch.are_deterministic_algorithms_enabled() == wanted

        # With its benchmark cuDNN may take other kernels each time.
        assert torch.backends.cudnn.benchmark != wanted


def test_a_run_goes_on_with_the_same_images_wherever_they_are(unfinished, tiny_run, pictures):
    """A run is refused whose images are fewer, or other ones of the same names."""
    elsewhere = shutil.copytree(pictures, unfinished.parent.parent / "moved")
    resume = ["--resume", unfinished, "--diffusion.dataset-name", elsewhere]
    picture = elsewhere / "00007.png"
    pixels = picture.read_bytes()
    before = (unfinished / "config.json").read_bytes()
    picture.write_bytes((elsewhere / "00008.png").read_bytes())
    with pytest.raises(ConfigError, match="other images"):
        call(train.main, *resume)
    picture.unlink()
    with pytest.raises(ConfigError, match="other images"):
        call(train.main, *resume)
    assert (unfinished / "config.json").read_bytes() == before

    picture.write_bytes(pixels)
    call(train.main, *resume)
    assert same(newest(unfinished)["ema"], newest(tiny_run)["ema"])


def test_a_run_that_went_on_meanwhile_is_not_rewound(unfinished, monkeypatch):
    """Another process writes a checkpoint while this one waits for the lock."""
    path = checkpoints_of(unfinished)[-1]
    monkeypatch.setattr(
        "functions.training.recorder.locked",
        lambda folder: nullcontext(shutil.copy(path, path.with_stem("step-00000009"))),
    )
    with pytest.raises(UserError, match="has just trained there; resume it again"):
        call(train.main, "--resume", unfinished)


@posix
def test_a_signal_before_the_last_grid_is_heeded(unfinished, tiny_run, monkeypatch):
    """A run that has its last checkpoint, but not its last grid, is unfinished."""
    resume = ["faces", "--resume", "auto", "--runs", unfinished.parent]
    save = train.Recorder.save

    def save_and_terminate(recorder):
        save(recorder)
        terminate()

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="75"):
        patch.setattr(train.Recorder, "save", save_and_terminate)
        call(train.main, *resume)
    assert newest(unfinished)["run"]["step"] == 10
    assert "step-00000010.png" not in sample_grids(unfinished)
    call(train.main, *resume)
    assert list(unfinished.parent.iterdir()) == [unfinished]
    assert_same_run(tiny_run, unfinished)
