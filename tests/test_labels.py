"""Labels, from a data set to samples: what they are, what training does, and what is drawn."""

import json
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import edit
import evaluate
import sample
import train
from config import ConfigError
from data.datasets import load_images, split_images
from functions.sampling import editing
from functions.sampling.generation import given
from functions.sampling.inpainting import Keeping
from functions.saved.checkpoint import Checkpoint, write_tensors
from functions.saved.loading import load_denoiser
from functions.saved.run_folder import checkpoints_of
from functions.training.opening import open_run
from models.unet import UNet
from tests.conftest import (
    ONE_LEVEL,
    SMALL_MODEL,
    TINY,
    call,
    changed,
    normal,
    pipeline_of,
    pixels_of,
    refused,
    samples_of,
    small_unet,
    train_tiny,
    words,
)
from tests.data.packing import IMAGES, encoded, labels_of, write_folder

# Pictures with these labels are red, green and blue.
NAMES = ["2", "10", "blue"]
LABELS = "--diffusion.labels true --diffusion.condition-dropout 0.5"
FEW = "--steps 4 --device cpu"


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    """Return a folder of 40 plain pictures in folders of their labels, 13 or 14 in each."""
    rng = np.random.default_rng(0)
    files = {}
    for i in range(40):
        noisy = 30 + 200 * np.eye(3)[i % 3] + rng.normal(0, 20, (8, 8, 3))
        files[f"a/{NAMES[i % 3]}/{i:03d}.png"] = encoded(noisy.clip(0, 255).astype(np.uint8))
    return write_folder(tmp_path_factory.mktemp("coloured"), [], more=files)


@pytest.fixture
def renamed(coloured, tmp_path):
    """Return a copy of the folder whose label "blue" is "azure"."""
    data = shutil.copytree(coloured, tmp_path / "renamed")
    (data / "a" / "blue").rename(data / "a" / "azure")
    return data


@pytest.fixture(scope="module")
def labelled_run(coloured, tmp_path_factory):
    """Return a run whose samples have the colours of their labels."""
    flags = """
        --diffusion.epochs 30
        --diffusion.learning-rate 5e-3
        --diffusion.ema-decay 0.9
        --diffusion.objective v
        --diffusion.sample-every 1000
        --diffusion.validate-every 1000
    """
    return train_tiny(coloured, tmp_path_factory.mktemp("labelled"), ONE_LEVEL, LABELS, flags)


def test_the_nearest_folder_is_the_label_and_numbers_are_sorted_as_such(coloured):
    plain = load_images(coloured, 8)
    labelled = load_images(coloured, 8, labels=True)
    assert labelled.label_names == NAMES
    assert labels_of(coloured) == ", ".join(name.split("/")[1] for name in labelled.names)
    assert labelled.summary == f"{plain.summary}; 3 labels of 13 to 14 images"
    # What a run compares is as before, but for the labels themselves.
    before, now = (split_images(each, "reference").hashes for each in (plain, labelled))
    assert now | {"labels_hash": ""} == before


@pytest.mark.parametrize(
    "names, expected",
    [
        ("1/a.png b.png", "has no label for b.png: folders are labels"),
        # A folder that says which images are held out is no label.
        ("train/a.png val/b.png", "has no label for train/a.png"),
        ("top/train/a.png top/val/b.png", "has no label for top/train/a.png"),
        ("train/1/a.png train/2/c.png val/1/b.png", "1, 2, 1"),
        ("cat/b.png train/a.png", "cat, train"),
        ("test/bus/b.png train/train/a.png", "bus, train"),
    ],
)
def test_folders_are_labels_or_one_sentence_says_why_not(names, expected, tmp_path):
    write_folder(tmp_path, [], more=dict.fromkeys(names.split(), encoded(IMAGES[0])))
    assert expected in labels_of(tmp_path)


def begun(data, *flags):
    """Return a new run of the tiny experiment with these images, before its first step."""
    flags = ["faces", TINY, ONE_LEVEL, "--diffusion.dataset-name", data, *flags]
    with open_run(words(*flags), "") as run:
        return run


def test_a_new_run_needs_a_training_image_of_each_label(renamed):
    # The hash of this name is below a tenth.
    write_folder(renamed, [], more={"green/00033.png": encoded(IMAGES[0])})
    with refused("no training image has the label 'green'.* folders train/ and val/"):
        begun(renamed, LABELS)


def test_the_embedding_is_added_to_that_of_t_and_begins_at_zero():
    """The truth is the network whose time embedding has it in its last bias."""
    plain = small_unet()
    network = UNet(16, 3, 8, (1, 2), [1], 16, norm_groups=4, label_count=3)
    network.load_state_dict(plain.state_dict(), strict=False)
    labels = torch.arange(4)
    x_t, t = normal(0, 4, 3, 16, 16), labels + 1
    assert torch.equal(network(x_t, t, label=labels), plain(x_t, t))

    table = network.label_embedding.weight.detach().normal_()
    bias = plain.time_embedding.linear_2.bias
    before = bias.data
    for label in labels:
        bias.data = before + table[label]
        expected = plain(x_t, t)
        assert_close(network(x_t, t, label=labels)[label], expected[label])
    # The last row is for no label.
    assert_close(network(x_t, t), expected)


def test_samples_have_the_colours_of_their_labels(labelled_run, tmp_path):
    """Image i has the label i mod K, whatever its batch is; --cfg makes the colour stronger."""

    def drawn(cfg):
        flags = "--label blue 10 --n 8 --batch-size 3 --individual --cfg"
        call(sample, labelled_run, FEW, flags, cfg, "--out", tmp_path / cfg)
        return samples_of(tmp_path / cfg).mean((1, 2))

    plain, guided = drawn("1"), drawn("4")
    assert (plain.argmax(axis=1) == [2, 1] * 4).mean() > 0.8
    # How much more blue there is than red and green
    contrast = [-0.5, -0.5, 1]
    assert (guided[::2] @ contrast).mean() > (plain[::2] @ contrast).mean() + 2
    manifest = json.loads((tmp_path / "4" / "samples.json").read_text())
    assert manifest.items() >= {"label": ["blue", "10"], "cfg": 4.0}.items()


def test_guidance_by_the_label_is_that_of_the_same_network_without_it():
    """tests/functions/test_guidance.py has what a guide does."""
    pipeline = pipeline_of(UNet(**SMALL_MODEL, label_count=2), label=("b", "a"), cfg=2.5)
    guided = given(changed(pipeline, {"label_names": ["b", "a"]}), [0, 1, 2])
    assert guided.weight == 2.5
    assert guided.model.inputs["label"].tolist() == [0, 1, 0]
    assert guided.guide == pipeline.models.denoiser
    with refused("--steps 1: no step is at a noise level at which"):
        changed(pipeline, steps=1)
    # What has no network of its own says so.
    with refused("Keeping takes no label", TypeError):
        Keeping(guided.guide, None).given(label=torch.tensor([0]))


def test_edits_have_one_label(labelled_run, tmp_path, monkeypatch):
    monkeypatch.setattr(editing, "save_strip", save := mock.Mock())
    flags = [labelled_run, FEW, "--out", tmp_path, "--label"]
    call(sample, *flags, "blue --cfg 2 --indices 1 --individual")
    own = pixels_of(tmp_path / "00001.png").astype(float)
    call(edit, "vary 1", *flags, "blue --cfg 2 --depths 1")
    original, *variations = save.call_args.args[0].values()
    assert abs(original[0] - own).max() <= 1
    # From pure noise, each has the label's colour.
    assert sum(image[0].mean((0, 1)).argmax() == 2 for image in variations) >= 7


def test_held_out_images_are_measured_with_their_own_labels(labelled_run, coloured):
    with mock.patch.object(UNet, "forward", autospec=True, side_effect=UNet.forward) as calls:
        call(evaluate, labelled_run, "--t-stride 200")
    seen = [each.kwargs["label"].item() for each in calls.call_args_list]
    image_set = load_images(coloured, 8, labels=True)
    labels = image_set.inputs["label"][split_images(image_set, "reference").val_indices]
    assert seen == labels.repeat(len(seen) // len(labels)).tolist()


def test_a_run_goes_on_only_with_its_labels(labelled_run, coloured, renamed, tmp_path, capsys):
    """And bits/dim of other labels come with a warning."""
    resume = ["--resume", labelled_run, "--device cpu --diffusion.epochs 31"]
    with open_run(words(*resume), ""):
        pass
    # The images and their names are the same, and so are their ids.
    moved = shutil.copytree(coloured, tmp_path / "moved")
    picture = next((moved / "a" / "2").iterdir())
    picture.rename(moved / "a" / "blue" / picture.name)
    for data in (renamed, moved):
        with refused("was trained with other labels than", ConfigError):
            call(train, *resume, "--diffusion.dataset-name", data)
    measure = [labelled_run, "--images 2 --t-stride 100 --device cpu --data"]
    with refused("has other labels than .*: 2, 10, blue"):
        call(evaluate, *measure, renamed)
    call(evaluate, *measure, moved)
    assert "it was trained with other labels;" in capsys.readouterr().err


def test_weights_with_and_without_labels_begin_other_runs(labelled_run, coloured, renamed, path):
    """Of the same labels they keep the table; else all begins as the model is without a label."""
    network = load_denoiser(labelled_run).network
    x_t, t = normal(0, 3, 3, 8, 8), torch.tensor([1, 50, 99])
    same = begun(coloured, "--init", labelled_run, LABELS)
    assert torch.equal(same.ema_model.label_embedding.weight, network.label_embedding.weight)
    without = begun(coloured, "--init", labelled_run)
    without.save(path)
    expected = network(x_t, t)
    assert_close(without.ema_model(x_t, t), expected)
    for data, init in ((renamed, labelled_run), (coloured, path)):
        other = begun(data, "--init", init, LABELS).ema_model
        assert_close(other(x_t, t), expected)
        assert_close(other(x_t, t, label=torch.arange(3)), expected)


def test_a_model_that_never_saw_a_missing_label_needs_one(labelled_run, path, tmp_path):
    last = Checkpoint(checkpoints_of(labelled_run)[-1])
    last.contents["config"]["diffusion"]["condition_dropout"] = 0.0
    write_tensors(path, {"ema": last.tensors("ema")}, last.contents)
    for flags in ("", "--label blue --cfg 2"):
        with refused(
            "never saw an image without its label .* needs a --label, without --cfg: 2, 10"
        ):
            call(sample, path, FEW, flags, "--n 1")
    call(sample, path, FEW, "--n 1 --label blue --out", tmp_path / "out")


def test_a_file_keeps_labels_and_a_folder_of_diffusers_has_none(labelled_run, path, tmp_path):
    call(sample, labelled_run, "--export", path)
    call(sample, path, FEW, "--label blue --n 1 --out", tmp_path / "out")
    with refused("diffusers has no such model .it was trained with labels.; export it to a file"):
        call(sample, labelled_run, "--export", tmp_path / "folder")


def test_grids_of_a_training_show_the_labels_in_turn(labelled_run, tmp_path):
    """The truth is what sample.py draws with all labels, of the EMA weights after the last step."""
    grid = pixels_of(max((labelled_run / "samples").iterdir()))
    flags = "--sampler dpm++ --n 4 --label 2 10 blue --precision float32"
    call(sample, labelled_run, FEW, flags, "--out", tmp_path)
    assert np.abs(grid.astype(float) - pixels_of(tmp_path / "grid.png")).max() <= 1


def test_labels_are_those_of_the_model_and_of_its_guide(labelled_run, renamed, path, tmp_path):
    """tests/test_bad_input.py has what is refused of any model."""
    with refused("--label: the model knows 2, 10, blue, and not 'green'"):
        call(sample, labelled_run, FEW, "--label 2 green")
    guide = begun(renamed, LABELS)
    guide.save(path)
    with refused("cannot guide .*: other labels"):
        call(sample, labelled_run, FEW, "--label 2 --guide", path)
    call(sample, labelled_run, FEW, "--n 1 --guide", path, "--out", tmp_path / "out")
