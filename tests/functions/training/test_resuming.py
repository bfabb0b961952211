"""What a resumed run keeps, what it may change, and what it says of the rest."""

import json
import shutil

import pytest
import torch

import sample
import train
from config import ConfigError
from functions.support.errors import UserError
from functions.training.metrics import read_metrics
from tests.conftest import call, during, interrupt, newest, posix, terminate, train_tiny
from tests.kill import assert_same_run


@pytest.mark.slow
@posix
def test_what_a_resumed_run_may_change(unfinished, capsys):
    """Made longer, and stopped before its next checkpoint, it goes on by itself: its newest says already how long."""
    for flags, message in (
        (
            ["--diffusion.learning-rate", "1e-3", "--model.base-dim", "16"],
            r"diffusion\.learning_rate, model\.base_dim",
        ),
        (["--diffusion.batch-size", "4"], r"diffusion\.batch_size"),
    ):
        with pytest.raises(ConfigError, match=f"cannot change {message}"):
            call(train.main, "--resume", unfinished, *flags)
    with pytest.raises(ConfigError, match="a run of 'faces', not of 'ffhq-full'"):
        call(train.main, "ffhq-full", "--resume", unfinished)
    capsys.readouterr()
    with pytest.raises(KeyboardInterrupt), during(1, interrupt):
        call(
            train.main,
            "--resume",
            unfinished,
            "--diffusion.batch-size",
            4,
            "--diffusion.gradient-accumulation",
            2,
            "--diffusion.epochs",
            3,
        )
    printed = capsys.readouterr().out
    assert "changed: diffusion.epochs was 2, is now 3" in printed
    assert "changed: diffusion.batch_size was 8, is now 4" in printed
    assert "warning: batch_size was 8, is now 4: no longer bit for bit" in printed
    assert "note: model.base_dim stays 8, as the run was started; config.py has 32" in printed
    call(train.main, "faces", "--resume", "auto", "--runs", unfinished.parent)
    assert newest(unfinished)["run"]["step"] == 15
    assert [row["step"] for row in read_metrics(unfinished / "metrics.csv")] == [
        2,
        4,
        5,
        6,
        8,
        10,
        12,
        14,
        15,
    ]
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
    torch.set_num_threads(2)
    call(train.main, "--resume", run, "--diffusion.epochs", 3, "--dry-run")
    assert (
        "warning: threads was 1, is now 2: no longer bit for bit as if never stopped"
        in capsys.readouterr().out
    )


def test_deterministic_kernels_are_asked_for_and_only_then(trained):
    for value in ("true", "false"):
        trained("--dry-run", "--diffusion.deterministic", value)
        assert torch.are_deterministic_algorithms_enabled() == (value == "true")
        assert torch.backends.cudnn.benchmark == (value == "false")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_deterministic_run_on_the_gpu_resumes_bit_for_bit_and_is_sampled_from(
    precision, pictures, tmp_path
):
    flags = [
        "--device",
        "cuda",
        "--diffusion.deterministic",
        "true",
        "--diffusion.precision",
        precision,
    ]
    straight = train_tiny(pictures, tmp_path / "straight", *flags)
    with pytest.raises(SystemExit, match="75"), during(7, terminate):
        train_tiny(pictures, tmp_path / "cut", *flags)
    call(train.main, "faces", "--resume", "--runs", tmp_path / "cut", "--device", "cuda")
    assert_same_run(straight, *(tmp_path / "cut").iterdir())
    call(sample.main, "--runs", tmp_path / "cut", "--n", 2, "--steps", 3, "--device", "cuda")


def test_only_the_run_with_the_same_images_is_resumed(unfinished, pictures, tmp_path, monkeypatch):
    """Here the data set of its name has lost one."""
    fewer = shutil.copytree(
        pictures, tmp_path / "pictures", ignore=shutil.ignore_patterns("00007.png")
    )
    load = train.load_images
    monkeypatch.setattr(train, "load_images", lambda name, *others: load(str(fewer), *others))
    before = (unfinished / "config.json").read_bytes()
    with pytest.raises(ConfigError, match="other images"):
        call(train.main, "--resume", unfinished)
    assert (unfinished / "config.json").read_bytes() == before
    with pytest.raises(UserError, match="not a run folder"):  # a file in it is not the run
        call(train.main, "--resume", next((unfinished / "checkpoints").iterdir()))
