"""The model in the box: when it is used, its card, and the samples of the real one."""

import hashlib
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import edit
import evaluate
import sample
import sampleFFHQ
from config import Experiment
from data import datasets
from data.datasets import load_images
from data.pixels import to_uint8
from figures import pretrained
from figures.saved_model import ENLARGER, GUIDE_STEP, GUIDED
from functions.evaluation.bits_per_dim import evenly_spaced
from functions.sampling.guides import guide_beside
from functions.saved import run_folder
from functions.saved.checkpoint import load_weights
from functions.saved.run_folder import PRETRAINED, checkpoints_of, newest_run
from functions.support.errors import CheckpointError, UserError
from functions.support.pictures import grid_of
from tests.conftest import HELD_OUT, ROOT, TRAINED, call, train_tiny

TAKEN = "using pretrained/faces.safetensors, which comes with the repository"
FLAGS = ("--n", 2, "--steps", 3)


@pytest.fixture
def box(tiny_run, tmp_path, monkeypatch):
    """Return a folder with a model and others, in a working directory without runs."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "pretrained"
    folder.mkdir()
    monkeypatch.setattr(run_folder, "PRETRAINED", folder / "faces.safetensors")
    shutil.copy(checkpoints_of(tiny_run, "snapshots")[-1], folder / "faces.safetensors")
    # Other weights, which draw other images.
    for name in ("faces-guide", "another"):
        shutil.copy(checkpoints_of(tiny_run)[0], folder / f"{name}.safetensors")
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
    (path,) = box.glob("samples/faces-*-ddpm-3-trailing-small-float32-seed0-n2/grid.png")
    drawn = Image.open(path)

    call(sample.main, checkpoints_of(tiny_run, "snapshots")[-1], *FLAGS, "--out", tmp_path / "a")
    assert drawn.tobytes() == Image.open(tmp_path / "a" / "grid.png").tobytes()

    # The model is taken by its name: neither for another experiment, nor another file.
    assert newest_run(Path("runs"), "fa") == box / "faces.safetensors"
    with pytest.raises(CheckpointError, match=r"no run of an experiment another\*"):
        newest_run(Path("runs"), "another")
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
    # A run of another experiment does not count.
    other = shutil.copytree(run, "runs/faces-20260101-120000")
    call(sampleFFHQ.main, "--steps", 3)
    assert "runs: no run of an experiment ffhq* with a checkpoint" in capsys.readouterr().out
    shutil.rmtree(other)
    [folder] = (tmp_path / "samples").iterdir()
    assert {"grid.png", "denoising.gif"} <= {path.name for path in folder.iterdir()}
    # It has five columns and four rows.
    grid = Image.open(folder / "grid.png")
    assert grid.width / grid.height == pytest.approx(5 / 4, rel=0.02)

    needed = f"needs the images that {boxed} was trained on: FFHQ was not found at .*--data NAME"
    with pytest.raises(UserError, match=needed) as caught:
        call(evaluate.main)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_run_is_boxed_with_a_guide_and_a_card(trained, pictures, tmp_path, monkeypatch):
    boxed = tmp_path / "pretrained" / "faces.safetensors"
    guide = boxed.with_name("faces-guide.safetensors")
    monkeypatch.setattr(pretrained, "PRETRAINED", boxed)
    monkeypatch.setattr(pretrained, "GUIDE_STEP", 3)
    monkeypatch.setattr(pretrained, "GUIDED", "--sampler ddim --steps 4 --guide 3")
    monkeypatch.setattr(pretrained, "SAMPLE_COUNT", 3)
    run = trained("--diffusion.snapshot-every", 3)
    source = load_weights(checkpoints_of(run)[-1])
    changes = {"epochs": 7}, {"dim_multiply": (2, 2)}
    longer = Experiment.from_dict(source.config).override(*changes)
    monkeypatch.setattr(pretrained, "EXPERIMENTS", {"faces": longer})
    call(pretrained.main, run)

    for name, weight in load_weights(boxed).weights.items():
        assert torch.equal(weight, source.weights[name].half().float())
    # The snapshots are of steps 3, 6, 9 and 10.
    assert guide.read_bytes() == checkpoints_of(run, "snapshots")[0].read_bytes()
    assert hashlib.sha256(guide.read_bytes()).hexdigest() in card_row(boxed, "SHA-256 of the guide")
    flags = "--diffusion.epochs 2 --model.dim-multiply 1,2"
    assert card_row(boxed, "command") == f"python train.py faces {flags}"
    initial = "a/small.safetensors: EMA weights, grown from 8 px"
    grown = replace(source, provenance=source.provenance | {"initial": initial})
    rows = pretrained.facts_of_run(run, grown)
    assert rows["command"].endswith("1,2 --init a/small.safetensors`")
    assert rows["begins as"] == initial
    assert card_row(boxed, "length") == "10 steps, 80 images"
    assert source.digest[:16] in card_row(boxed, "source")
    assert card_row(boxed, "training images").startswith("46 of ")
    assert card_row(boxed, "held-out images") == "4: 33 to 49"

    # Each training image is compared as it is, and mirrored.
    grey = load_images(source.config["diffusion"]["dataset_name"], 16).images.mean(3)
    training = [image.ravel() for i in TRAINED for image in (grey[i], grey[i][:, ::-1])]
    held_out = [grey[i].ravel() for i in evenly_spaced(np.array(HELD_OUT), 3)]
    correlations = np.corrcoef(held_out, training)[:3, 3:]
    row = "correlation with the most similar training image, of grey levels"
    shown = float(card_row(boxed, row).split("; held-out images ")[1])
    assert shown == pytest.approx(correlations.max(axis=1).mean(), abs=1e-3)

    # What is written by hand stays.
    card = boxed.with_name("README.md")
    card.write_text(card.read_text().replace("80 images", "9 images") + "\n## By hand\n\nDiscs\n")
    call(pretrained.main, run)
    assert card_row(boxed, "length") == "10 steps, 80 images"
    assert card.read_text().endswith("RUN`.\n\n## By hand\n\nDiscs\n")

    # A model of another name enlarges the samples.
    size = ("--model.image-size", 32, "--model.lowest-resolution-size", 16)
    large = train_tiny(pictures, tmp_path / "large", *size)
    monkeypatch.setattr(
        pretrained, "PRETRAINED", boxed.rename(boxed.with_name("small.safetensors"))
    )
    guide.rename(guide.with_name("small-guide.safetensors"))
    call(pretrained.main, large)
    assert "--enlarge pretrained/faces.safetensors" in boxed.with_suffix(".md").read_text()
    assert pretrained.draw(2, boxed).shape == (2, 3, 32, 32)


def test_the_real_model_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert newest_run(Path("runs")) == newest_run(Path("runs"), "ffhq") == PRETRAINED
    assert load_weights(PRETRAINED).provenance["experiment"] == PRETRAINED.stem
    guide = guide_beside(PRETRAINED)
    assert load_weights(guide).provenance["step"] == GUIDE_STEP
    assert card_row(PRETRAINED, "file") == PRETRAINED.name
    assert card_row(PRETRAINED, "guide") == guide.name
    digest = hashlib.sha256(guide.read_bytes()).hexdigest()
    assert card_row(PRETRAINED, "SHA-256 of the guide") == digest
    digest = hashlib.sha256(ENLARGER.read_bytes()).hexdigest()
    assert digest in ENLARGER.with_suffix(".md").read_text()


@pytest.mark.slow
def test_the_real_model_draws_readmes_first_picture():
    readme = (ROOT / "README.md").read_text()
    command = f".venv/bin/python sample.py {GUIDED} --enlarge pretrained/{ENLARGER.name}\n"
    assert command in readme.split("## Start")[1].split("\n## ")[0]
    drawn = np.array(grid_of(to_uint8(pretrained.draw(2, ENLARGER)), 2)).astype(float)
    shown = np.array(Image.open(ROOT / "figures" / "people.webp")).astype(float)
    # The picture was drawn in bfloat16. The people of the second row differ more.
    height, width = drawn.shape[:2]
    first, second = (shown[y : y + height, :width] for y in (0, 260))
    assert np.abs(drawn - first).mean() < 5 < np.abs(drawn - second).mean()
