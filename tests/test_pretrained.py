"""The model in the box: when it is used, its card, and the samples of the real one."""

import hashlib
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import edit
import evaluate
import sample
import sampleFFHQ
from config import Experiment
from data import datasets
from figures import pretrained
from functions.evaluation.feature_distance import spoilt, training_features
from functions.sampling import calibration
from functions.saved import run_folder
from functions.saved.checkpoint import load_weights
from functions.saved.loading import load_and_split
from functions.saved.run_folder import PRETRAINED, checkpoints_of, newest_checkpoints
from functions.support.errors import CheckpointError, UserError
from tests.conftest import call, train_tiny

TAKEN = "using the model that comes with the repository (train your own: python train.py)"
FLAGS = ("--n", 2, "--steps", 3)


@pytest.fixture
def box(tiny_run, tmp_path, monkeypatch):
    """Return a folder with a model and another one, in a working directory that has no run."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "pretrained"
    folder.mkdir()
    monkeypatch.setattr(run_folder, "PRETRAINED", folder / "faces.safetensors")
    shutil.copy(checkpoints_of(tiny_run, "snapshots")[-1], folder / "faces.safetensors")
    shutil.copy(PRETRAINED, folder / "another.safetensors")
    return folder


def card_row(path, name):
    """Return the value of a row in the card of a model, which has the hash of its file."""
    card = (path.parent / "README.md").read_text()
    assert hashlib.sha256(path.read_bytes()).hexdigest() in card
    return re.search(rf"^\| {name} \| `?(.+?)`? \|$", card, re.MULTILINE)[1]


def test_without_a_run_the_box_is_sampled_and_evaluated_and_says_so(
    box, tiny_run, tmp_path, capsys
):
    call(sample.main, *FLAGS)
    printed = capsys.readouterr().out
    assert TAKEN in printed
    assert f"\n{box / 'faces.safetensors'}: EMA weights" in printed
    drawn = Image.open(box / "samples" / "faces-ddpm-3-trailing-small-float32-seed0" / "grid.png")

    call(sample.main, checkpoints_of(tiny_run, "snapshots")[-1], *FLAGS, "--out", tmp_path / "a")
    assert drawn.tobytes() == Image.open(tmp_path / "a" / "grid.png").tobytes()

    assert newest_checkpoints(Path("runs"), "fa") == [box / "faces.safetensors"]
    with pytest.raises(CheckpointError, match=r"no run of an experiment ffhq\*"):
        newest_checkpoints(Path("runs"), "ffhq")
    for main, *flags in (
        (evaluate.main, "--images", 2, "--t-stride", 50),
        (edit.main, "vary", 0, "--steps", 3),
    ):
        call(main, *flags)
        assert TAKEN in capsys.readouterr().out
    assert list(box.glob("evaluation/faces-bpd-*.json"))
    assert list(box.glob("samples/*/variations-0-*.png"))


def test_only_sampling_works_without_the_photos(pictures, tmp_path, monkeypatch, capsys):
    """A model of FFHQ comes without its photos, and what needs them says so in one sentence."""
    monkeypatch.setattr(datasets, "DATA_FOLDER", tmp_path)
    photos = shutil.copytree(pictures, tmp_path / "FFHQ")
    run = train_tiny("FFHQ", tmp_path / "runs", name="ffhq-64")
    shutil.rmtree(photos)
    boxed = shutil.copy(checkpoints_of(run)[-1], tmp_path / "ffhq-64.safetensors")
    monkeypatch.setattr(run_folder, "PRETRAINED", boxed)

    monkeypatch.chdir(tmp_path / "runs")
    monkeypatch.setattr(calibration, "IMAGE_COUNT", 4)
    monkeypatch.setattr(calibration, "TIMESTEP_COUNT", 2)
    # A run of another experiment does not count.
    other = shutil.copytree(run, "runs/faces-20260101-120000")
    call(sampleFFHQ.main, "--steps", 3)
    assert "runs: no run of an experiment ffhq* with a checkpoint" in capsys.readouterr().out
    shutil.rmtree(other)
    [folder] = (tmp_path / "samples").iterdir()
    assert {"grid.png", "denoising.gif"} <= {path.name for path in folder.iterdir()}
    call(sample.main, "--calibrate", "own", *FLAGS, "--sampler", "ddim")

    needed = f"needs the images that {boxed} was trained on: FFHQ was not found at .*--data NAME"
    for main, *flags in (
        (evaluate.main,),
        (evaluate.main, "distance", *FLAGS),
        (sample.main, "--calibrate", *FLAGS),
    ):
        with pytest.raises(UserError, match=needed) as caught:
            call(main, *flags)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_run_is_boxed_with_a_card(trained, tmp_path, monkeypatch):
    run = trained()
    box = tmp_path / "pretrained"
    monkeypatch.setattr(pretrained, "PRETRAINED", box / "faces.safetensors")
    with pytest.raises(UserError, match="differs from the presets"):
        call(pretrained.main, run)

    source = checkpoints_of(run)[-1]
    preset = Experiment.from_dict(load_weights(source).config)
    monkeypatch.setattr(pretrained, "EXPERIMENTS", {"faces": preset})
    call(pretrained.main, run)

    boxed = box / "faces.safetensors"
    average = load_weights(source).weights
    for name, weight in load_weights(boxed).weights.items():
        assert torch.equal(weight, average[name].half().float())
    assert card_row(boxed, "command") == "python train.py faces"
    assert load_weights(source).digest[:16] in card_row(boxed, "source")


def test_the_real_model_is_calibrated_on_its_training_images(tmp_path, monkeypatch):
    """The file does not say the hash of its pixels."""
    monkeypatch.setattr(calibration, "IMAGE_COUNT", 4)
    monkeypatch.setattr(calibration, "TIMESTEP_COUNT", 2)
    copy = shutil.copy(PRETRAINED, tmp_path)
    call(sample.main, copy, *FLAGS, "--calibrate")
    assert len([*tmp_path.glob(f"{PRETRAINED.stem}-calibration-data-*.safetensors")]) == 1


@pytest.mark.slow
def test_the_real_model_draws_what_its_card_says(tmp_path, monkeypatch):
    """It is found from any folder.

    Of fewer samples, and on another processor, the distance may be a little larger.
    """
    monkeypatch.chdir(tmp_path)
    assert newest_checkpoints(Path("runs")) == [PRETRAINED]
    monkeypatch.setattr(pretrained, "SAMPLE_COUNT", 64)
    saved, images = pretrained.draw(PRETRAINED)
    assert not spoilt(images).any()
    measured = float(card_row(PRETRAINED, "distance"))
    features = training_features(*load_and_split(saved))
    assert features.distance(features([images])) <= measured + 0.3
