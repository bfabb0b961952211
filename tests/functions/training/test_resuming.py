"""What a resumed run keeps, what it may change, and what it says of the rest."""

import json
import shutil

import pytest
import torch

import train
from config import ConfigError
from functions.support.errors import UserError
from functions.training.metrics import read_metrics
from tests.conftest import call, during, interrupt, newest, posix


@pytest.mark.slow
@posix
def test_what_a_resumed_run_may_change(unfinished, capsys):
    """A run that is made longer, and interrupted before its next checkpoint, remembers its length.

    Its newest checkpoint has it already, so it goes on without being told again.
    """
    message = r"cannot change diffusion\.learning_rate, diffusion\.optimizer, model\.base_dim"
    with pytest.raises(ConfigError, match=message):
        changes = "--diffusion.learning-rate 1e-3 --diffusion.optimizer muon --model.base-dim 16"
        call(train.main, "--resume", unfinished, *changes.split())
    with pytest.raises(ConfigError, match=r"cannot change diffusion\.batch_size"):
        call(train.main, "--resume", unfinished, "--diffusion.batch-size", "4")
    with pytest.raises(ConfigError, match="a run of 'faces', not of 'ffhq-full'"):
        call(train.main, "ffhq-full", "--resume", unfinished)
    capsys.readouterr()

    # The effective batch stays the same, so this is allowed.
    with pytest.raises(KeyboardInterrupt), during(1, interrupt):
        changes = "--diffusion.batch-size 4 --diffusion.gradient-accumulation 2"
        call(train.main, "--resume", unfinished, *changes.split(), "--diffusion.epochs", 3)
    printed = capsys.readouterr().out
    assert "changed: diffusion.epochs was 2, is now 3" in printed
    assert "changed: diffusion.batch_size was 8, is now 4" in printed
    assert "warning: batch_size was 8, is now 4: no longer bit for bit" in printed
    assert "note: model.base_dim is 8 in this run; config.py has 32" in printed

    # It goes on to the end of three epochs, each of five steps.
    call(train.main, "faces", "--resume", "auto", "--runs", unfinished.parent)
    assert newest(unfinished)["run"]["step"] == 15
    rows = read_metrics(unfinished / "metrics.csv")
    assert [row["step"] for row in rows] == [2, 4, 5, 6, 8, 10, 12, 14, 15]
    assert json.loads((unfinished / "config.json").read_text())["diffusion"]["epochs"] == 3
    with pytest.raises(ConfigError, match="finished"):
        call(train.main, "--resume", unfinished)


@pytest.mark.slow
def test_resuming_keeps_precision_and_says_what_it_cannot_keep(trained, monkeypatch, capsys):
    """A run started with "auto" where that is bfloat16 goes on in bfloat16 where it is not."""
    monkeypatch.setattr("functions.support.device.cpu_has_bfloat16", lambda: True)
    run = trained("--diffusion.precision", "auto", "--diffusion.epochs", 1)
    monkeypatch.setattr("functions.support.device.cpu_has_bfloat16", lambda: False)
    capsys.readouterr()
    call(train.main, "--resume", run, "--diffusion.epochs", 2)
    assert "no longer bit for bit" not in capsys.readouterr().out
    assert newest(run)["run"]["arithmetic"]["precision"] == "bfloat16"

    # Another number of threads adds in another order.
    torch.set_num_threads(2)
    call(train.main, "--resume", run, "--diffusion.epochs", 3, "--dry-run")
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


def test_only_the_run_with_the_same_images_is_resumed(unfinished, pictures, tmp_path, monkeypatch):
    """A run is refused whose data set, of the same name, has lost an image since its start."""
    without_one = shutil.ignore_patterns("00007.png")
    fewer = shutil.copytree(pictures, tmp_path / "pictures", ignore=without_one)
    load = train.load_images
    monkeypatch.setattr(train, "load_images", lambda name, *others: load(str(fewer), *others))
    before = (unfinished / "config.json").read_bytes()
    with pytest.raises(ConfigError, match="other images"):
        call(train.main, "--resume", unfinished)
    assert (unfinished / "config.json").read_bytes() == before

    # A checkpoint in a run folder is not the run.
    with pytest.raises(UserError, match="not a run folder"):
        call(train.main, "--resume", next((unfinished / "checkpoints").iterdir()))
