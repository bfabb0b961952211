"""train.py and sample.py as a user calls them: a run from start to end, resumed, and every kind of bad input."""

import json
import os
import shutil
import signal

import pytest
import torch

import sample
import train
from config import ConfigError
from functions.checkpoint import CheckpointError, load_checkpoint
from functions.metrics import read_metrics
from functions.stopping import TrainingError
from tests.conftest import ROOT, TINY, call, script


def weights_of(run):
    return load_checkpoint(sorted((run / "checkpoints").iterdir())[-1])


def assert_same_state(a, b):
    for part in ("model", "ema"):
        assert all(torch.equal(a[part][name], b[part][name]) for name in a[part])
    for i, state in a["optimizer"]["state"].items():
        assert all(torch.equal(state[name], b["optimizer"]["state"][i][name]) for name in state)


def assert_same_metrics(run, other):
    """Every number of every row, but for how fast it was."""
    for a, b in zip(read_metrics(run / "metrics.csv"), read_metrics(other / "metrics.csv"), strict=True):
        assert {**a, "images_per_second": 0} == {**b, "images_per_second": 0}


def test_a_run_folder_holds_everything(tiny_run):
    config = json.loads((tiny_run / "config.json").read_text())
    assert config["experiment"] == "faces"
    assert config["model"]["base_dim"] == 8
    assert config["run"]["total_steps"] == 10
    assert len(config["run"]["train_ids_hash"]) > 8
    rows = read_metrics(tiny_run / "metrics.csv")
    assert [row["step"] for row in rows] == [2, 4, 5, 6, 8, 10]
    assert [row["step"] for row in rows if row["val_loss"] is not None] == [5, 10]
    assert all(row["val_loss_ema"] is not None for row in rows if row["val_loss"] is not None)
    assert sorted(path.name for path in (tiny_run / "samples").glob("*.png")) == ["step-00000005.png",
                                                                                "step-00000010.png"]  # fmt: skip
    assert [path.name for path in sorted((tiny_run / "checkpoints").iterdir())] == ["step-00000005.pt",
                                                                                    "step-00000010.pt"]  # fmt: skip
    assert (tiny_run / "losses.png").stat().st_size > 1000
    assert list((tiny_run / "tensorboard").iterdir())


def test_the_loss_falls_and_the_checkpoint_samples(pictures, tmp_path):
    """60 steps on simple pictures: the validation loss ends well below its start, which is the noise's variance."""
    call(train.main, "faces", "--runs", tmp_path, "--diffusion.dataset-name", pictures, *TINY, "--diffusion.epochs",
         "12", "--diffusion.learning-rate", "5e-3", "--diffusion.validation-samples", "64")  # fmt: skip
    run = next(tmp_path.iterdir())
    losses = [row["val_loss"] for row in read_metrics(run / "metrics.csv") if row["val_loss"] is not None]
    assert losses[0] > 0.6
    assert losses[-1] < 0.35
    call(sample.main, run, "--n", 2, "--steps", 5)


def test_the_same_command_gives_the_same_losses(tiny_run, pictures, tmp_path):
    call(train.main, "faces", "--runs", tmp_path, "--diffusion.dataset-name", pictures, *TINY)
    again = next(tmp_path.iterdir())
    assert_same_metrics(again, tiny_run)
    assert_same_state(weights_of(tiny_run), weights_of(again))


def test_a_resumed_run_goes_on_as_if_never_stopped(tiny_run, pictures, tmp_path):
    """Stopped in the middle, by an interrupt after the checkpoint of step 5."""
    steps = []

    def interrupt(*args, **kwargs):
        steps.append(1)
        if len(steps) == 7:
            raise KeyboardInterrupt
        return update(*args, **kwargs)

    update = train.update_ema
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "update_ema", interrupt)
        call(train.main, "faces", "--runs", tmp_path, "--diffusion.dataset-name", pictures, *TINY)
    run = next(tmp_path.iterdir())
    call(train.main, "faces", "--resume", "--runs", tmp_path)
    assert list(tmp_path.iterdir()) == [run]
    assert_same_state(weights_of(tiny_run), weights_of(run))
    assert_same_metrics(run, tiny_run)
    with pytest.raises(CheckpointError, match="no unfinished run"):
        call(train.main, "faces", "--resume", "--runs", tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_finishes_the_step_saves_and_exits_with_75(name, tiny_run, pictures, tmp_path, capsys):
    """The signal comes in the middle of step 7; the run stops after it and then goes on as if never stopped."""
    steps, update = [], train.update_ema

    def interrupt(*args, **kwargs):
        steps.append(1)
        if len(steps) == 7:
            signal.raise_signal(getattr(signal, name))
        return update(*args, **kwargs)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(train, "update_ema", interrupt)
        call(train.main, "faces", "--runs", tmp_path, "--diffusion.dataset-name", pictures, *TINY)
    assert stop.value.code == 75
    assert signal.getsignal(signal.SIGTERM) == before
    run = next(tmp_path.iterdir())
    assert weights_of(run)["run"]["step"] == 7
    assert f"stopped by {name}, saved; go on with: python train.py --resume {run}" in capsys.readouterr().out
    call(train.main, "--resume", run)
    assert_same_state(weights_of(tiny_run), weights_of(run))
    assert_same_metrics(run, tiny_run)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_second_signal_ends_the_process_at_once():
    code = "import signal; from functions.stopping import StopSignals\nwith StopSignals():\n"
    code += (
        "    signal.raise_signal(signal.SIGTERM)\n    print('one', flush=True)\n    signal.raise_signal(signal.SIGINT)"
    )
    result = script("-c", code + "\n    print('two')")
    assert result.returncode == 130
    assert result.stdout == "one\n"


def test_a_finished_run_goes_on_with_more_epochs_only(tiny_run, pictures, tmp_path):
    call(train.main, "faces", "--runs", tmp_path, "--diffusion.dataset-name", pictures, *TINY)
    run = next(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="finished"):
        call(train.main, "--resume", run)
    with pytest.raises(ConfigError, match=r"cannot change diffusion\.learning_rate, model\.base_dim"):
        call(train.main, "--resume", run, "--diffusion.learning-rate", "1e-3", "--model.base-dim", "16")
    with pytest.raises(ConfigError, match="a run of 'faces', not of 'ffhq-full'"):
        call(train.main, "ffhq-full", "--resume", run)
    call(train.main, "--resume", run, "--diffusion.epochs", "3")
    assert weights_of(run)["run"]["step"] == 15
    assert json.loads((run / "config.json").read_text())["diffusion"]["epochs"] == 3


def test_only_the_run_with_the_same_images_is_resumed(pictures, tmp_path):
    copy = tmp_path / "pictures"
    shutil.copytree(pictures, copy)
    call(train.main, "faces", "--runs", tmp_path / "runs", "--diffusion.dataset-name", copy, *TINY)
    run = next((tmp_path / "runs").iterdir())
    next(copy.glob("0*.png")).unlink()
    before = (run / "config.json").read_bytes()
    with pytest.raises(ConfigError, match="other images"):
        call(train.main, "--resume", run, "--diffusion.epochs", "3")
    assert (run / "config.json").read_bytes() == before
    with pytest.raises(CheckpointError, match="not a run folder"):  # a file in it is not the run
        call(train.main, "--resume", next((run / "checkpoints").iterdir()))


def test_rotation_is_off_in_the_last_part_of_a_run(pictures, tmp_path, monkeypatch):
    angles, augment = [], train.augment
    monkeypatch.setattr(train, "augment", lambda x, flip, angle: angles.append(angle) or augment(x, flip, angle))
    call(train.main, "ffhq-full", "--runs", tmp_path, "--diffusion.dataset-name", pictures, *TINY,
         "--diffusion.rotation-free-end", "0.3")  # fmt: skip
    assert [angle is not None for angle in angles] == [True] * 7 + [False] * 3
    assert all(0 < angle.abs().max() <= 3 for angle in angles[:7])


def test_a_loss_that_is_no_number_ends_the_run_before_it_is_saved(pictures, tmp_path):
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) near step \d+ .*lower the learning rate"):
        call(train.main, "faces", "--runs", tmp_path, "--diffusion.dataset-name", pictures, *TINY,
             "--diffusion.learning-rate", "1", "--diffusion.clip-grad-norm", "0", "--diffusion.precision", "bfloat16",
             "--diffusion.epochs", "200", "--diffusion.log-every", "1")  # fmt: skip


def test_micro_batches_change_the_sum_of_gradients_by_rounding_alone(tiny_run, pictures, tmp_path):
    """Four passes of 2 images are one pass of 8: same images, same draws, same division of the loss."""
    call(train.main, "faces", "--runs", tmp_path, "--diffusion.dataset-name", pictures, *TINY,
         "--diffusion.batch-size", "2", "--diffusion.gradient-accumulation", "4")  # fmt: skip
    accumulated = read_metrics(next(tmp_path.iterdir()) / "metrics.csv")
    for a, b in zip(accumulated, read_metrics(tiny_run / "metrics.csv"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_without_ema_the_raw_weights_are_used_and_it_is_said(pictures, tmp_path, capsys):
    call(train.main, "faces", "--runs", tmp_path, "--diffusion.dataset-name", pictures, *TINY,
         "--diffusion.ema-decay", "0", "--diffusion.epochs", "1", "--diffusion.rescale-betas", "false")  # fmt: skip
    printed = capsys.readouterr().out
    assert "samples use the raw weights" in printed
    assert "x_T still carries the image" in printed
    assert "rescale_betas" in printed
    call(sample.main, "--runs", tmp_path, "--n", 1, "--steps", 1)
    assert "raw weights" in capsys.readouterr().out


def test_the_scripts_work_from_another_folder(pictures, tmp_path):
    trained = script(ROOT / "train.py", "--diffusion.dataset-name", pictures, *TINY, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "epoch 2/2" in trained.stderr
    assert "img/s" in trained.stderr
    sampled = script(ROOT / "sample.py", "--n", "2", "--steps", "2", cwd=tmp_path)
    assert sampled.returncode == 0, sampled.stderr
    assert list((tmp_path / "runs").glob("faces-*/samples/*/grid.png"))
