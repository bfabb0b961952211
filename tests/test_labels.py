"""Labels, from a data set to samples: what they are, what training does, and what is drawn."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import edit
import evaluate
import sample
import train
from config import ConfigError
from data.datasets import load_images, split_images
from functions.enlarging import Keeping
from functions.evaluation.bits_per_dim import evenly_spaced
from functions.guidance import Guided
from functions.sampling import editing
from functions.sampling.generation import given
from functions.saved.checkpoint import Checkpoint, write_tensors
from functions.saved.loading import load_denoiser, load_model
from functions.saved.run_folder import checkpoints_of
from functions.support.errors import CheckpointError
from functions.training.opening import new_run
from models.unet import UNet
from tests.conftest import (
    CPU,
    SMALL_MODEL,
    TINY,
    call,
    changed,
    drawing_of,
    newest,
    normal,
    pixels_of,
    refused,
    samples_of,
    train_tiny,
)
from tests.data.packing import IMAGES, encoded, write_folder

LABEL_TABLE = "label_embedding.weight"
LABELS = "--diffusion.labels true --diffusion.condition-dropout 0.5"
FEW = "--steps 4 --device cpu"


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    """Return a folder of 40 plain pictures in folders of their colour, 13 or 14 in each."""
    folder = tmp_path_factory.mktemp("coloured")
    rng = np.random.default_rng(0)
    colours = {"2": (230, 30, 30), "10": (30, 230, 30), "blue": (30, 30, 230)}
    for i in range(40):
        name = [*colours][i % 3]
        (folder / "a" / name).mkdir(parents=True, exist_ok=True)
        noisy = np.clip(colours[name] + rng.normal(0, 20, (16, 16, 3)), 0, 255)
        Image.fromarray(noisy.astype(np.uint8)).save(folder / "a" / name / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="module")
def labelled_run(coloured, tmp_path_factory):
    """Return a run whose samples have the colours of their labels."""
    flags = "--diffusion.epochs 40 --diffusion.learning-rate 1e-2 --diffusion.ema-decay 0.9"
    flags += (
        " --diffusion.objective v --diffusion.sample-every 1000 --diffusion.validate-every 1000"
    )
    return train_tiny(coloured, tmp_path_factory.mktemp("labelled"), LABELS, flags)


def test_the_nearest_folder_is_the_label_and_numbers_are_sorted_as_such(coloured, capsys):
    plain = load_images(coloured, 16)
    labelled = load_images(coloured, 16, inputs=["label"])
    assert labelled.facts["label_names"] == ["2", "10", "blue"]
    for name, label in zip(labelled.names, labelled.inputs["label"], strict=True):
        assert f"/{labelled.facts['label_names'][label]}/" in f"/{name}"
    counts = np.bincount(labelled.inputs["label"])
    assert labelled.summary == f"{plain.summary}; 3 labels of {min(counts)} to {max(counts)} images"
    # What a run compares is as before, but for the labels themselves.
    before, now = (split_images(each, "reference").hashes for each in (plain, labelled))
    assert now | {"labels_hash": ""} == before
    assert len(now["labels_hash"]) == 16
    assert plain.inputs == {}


@pytest.mark.parametrize(
    "names, expected",
    [
        (["1/a.png", "b.png"], "has no label for b.png: folders are labels"),
        (["1/a.png", "1/b.png"], "has one label, 1; two are needed"),
        # Only the level of folders that says which images are held out is no label.
        (["train/a.png", "val/b.png"], "has no label for train/a.png"),
        (["test/train/a.png", "test/val/b.png"], "has one label, test; two are needed"),
        (["train/1/a.png", "train/2/c.png", "val/1/b.png"], ["1", "2"]),
        (["train/a.png", "cat/b.png"], ["cat", "train"]),
        (["1/train/a.png", "2/train/b.png", "1/val/c.png"], ["1", "2"]),
        (["vehicles/train/train/a.png", "vehicles/test/bus/b.png"], ["bus", "train"]),
    ],
)
def test_folders_are_labels_or_one_sentence_says_why_not(names, expected, tmp_path):
    write_folder(tmp_path, [], more=dict.fromkeys(names, encoded(IMAGES[0])))
    if isinstance(expected, str):
        with refused(expected):
            load_images(tmp_path, 8, inputs=["label"])
    else:
        assert load_images(tmp_path, 8, inputs=["label"]).facts["label_names"] == expected


def begun(data, *flags):
    """Return a new run of the tiny experiment with these images, before its first step."""
    flags = ["faces", TINY, "--diffusion.dataset-name", data, *flags]
    return new_run("faces", call(train, *flags, function="parse_flags"), CPU)


def test_a_new_run_needs_a_training_image_of_each_label(coloured, tmp_path):
    data = shutil.copytree(coloured, tmp_path / "data")
    (data / "a" / "2").rename(data / "a" / "Blue")
    assert "warning: labels differ in case alone: Blue, blue" in begun(data, LABELS).describe()
    write_folder(data / "green", IMAGES[:1], "{number:05d}.png")
    # The hash of this name is below a tenth.
    (data / "green" / "00000.png").rename(data / "green" / "00033.png")
    with refused("no training image has the label 'green'.* folders train/ and val/"):
        begun(data, LABELS)


def test_dropout_of_labels_without_labels_is_a_warning(coloured):
    warning = "warning: condition_dropout has no effect without a condition"
    flags = ("--diffusion.condition-dropout 0.5", LABELS, "")
    assert [warning in begun(coloured, each).describe() for each in flags] == [True, False, False]


def test_a_row_has_the_class_of_its_column(tmp_path):
    """By the names of Hugging Face's metadata, else by its number."""
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    image = {"bytes": encoded(IMAGES[0]), "path": None}
    info = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    for name, labels, metadata, expected in (
        ("named", [1, 0, 1], info, ["cat", "dog"]),
        ("numbers", [7, 0, 7], {"info": {"features": 5}}, ["0", "7"]),
    ):
        table = pa.table({"image": [image] * 3, "label": labels})
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
        parquet.write_table(table, tmp_path / f"{name}.parquet")
        image_set = load_images(tmp_path / f"{name}.parquet", 8, inputs=["label"])
        assert image_set.facts["label_names"] == expected
        assert image_set.inputs["label"].tolist() == [1, 0, 1]
    # Metadata that are no JSON are named.
    parquet.write_table(
        table.replace_schema_metadata({"huggingface": 9**5 * "["}), tmp_path / "a.parquet"
    )
    with refused("a.parquet: the labels cannot be read"):
        load_images(tmp_path / "a.parquet", 8, inputs=["label"])


def test_the_embedding_is_added_to_that_of_t_and_begins_at_zero():
    """The truth is the network whose time embedding has it in its last bias."""
    torch.manual_seed(0)
    network = UNet(**SMALL_MODEL, label_count=3)
    torch.manual_seed(0)
    plain = UNet(**SMALL_MODEL)
    for parameter in plain.parameters():
        parameter.data.add_(0.03 * torch.randn_like(parameter))
    network.load_state_dict(plain.state_dict(), strict=False)
    x_t, t = normal(0, 4, 3, 16, 16), torch.tensor([1, 2, 3, 4])
    labels = torch.tensor([0, 1, 2, 3])
    assert torch.equal(network(x_t, t, labels), plain(x_t, t))

    network.label_embedding.weight.data.normal_()
    rows = network.label_embedding.weight.detach()
    assert rows.shape == (4, 32)
    bias = plain.time_embedding.linear_2.bias
    before = bias.data.clone()
    for label in range(4):
        bias.data = before + rows[label]
        expected = plain(x_t, t)
        assert_close(network(x_t, t, torch.tensor([label])), expected)
        assert_close(network(x_t, t, labels)[label], expected[label])
    # The last row is for no label.
    assert_close(network(x_t, t), expected)


def test_samples_have_the_colours_of_their_labels(labelled_run, tmp_path, capsys):
    """Image i has the label i mod K, whatever its batch is; --cfg makes the colour stronger."""
    flags = f"{FEW} --label blue,10 --n 8 --batch-size 3 --individual"
    call(sample, labelled_run, flags, "--out", tmp_path / "plain")
    assert "label ('blue', '10')" in capsys.readouterr().out
    images = samples_of(tmp_path / "plain")
    channels = images.mean((1, 2)).argmax(axis=1)
    assert (channels == [2, 1] * 4).mean() > 0.8

    call(sample, labelled_run, flags, "--cfg 4 --out", tmp_path / "guided")
    plain, guided = (
        each[::2, ..., 2].mean() - each[::2, ..., :2].mean()
        for each in (images, samples_of(tmp_path / "guided"))
    )
    assert guided > plain + 2
    for name, facts in (("plain", {}), ("guided", {"cfg": 4.0})):
        manifest = json.loads((tmp_path / name / "samples.json").read_text())
        chosen = {key: manifest[key] for key in ("label", "cfg") if key in manifest}
        assert chosen == {"label": ["blue", "10"], **facts}


def test_guidance_by_the_label_is_that_of_the_same_network_without_it():
    """tests/functions/test_guidance.py has what a guide does."""
    drawing = drawing_of(UNet(**SMALL_MODEL, label_count=2), label=("b", "a"), cfg=2.5)
    guided = given(changed(drawing, {"facts": {"label_names": ["b", "a"]}}), [0, 1, 2])
    assert isinstance(guided, Guided)
    assert guided.weight == 2.5
    assert guided.model.inputs["label"].tolist() == [0, 1, 0]
    assert guided.guide == drawing.models.denoiser
    # What has no network of its own says so.
    with refused("Keeping takes no label", TypeError):
        Keeping(guided.guide, None).given(label=torch.tensor([0]))


def test_labels_that_cannot_be_drawn_are_one_sentence(labelled_run):
    """tests/test_bad_input.py has what is refused of any model."""
    with refused("--label: the model knows 2, 10, blue, and not 'green'"):
        call(sample, labelled_run, FEW, "--label 2,green")
    with refused("--cfg needs a condition: --label 2, 10, blue$"):
        call(sample, labelled_run, FEW, "--cfg 2")


def test_edits_have_one_label(labelled_run, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(editing, "save_strip", lambda columns, *_: shown.append(columns))
    call(sample, labelled_run, FEW, "--label blue --cfg 2 --indices 1 --individual --out", tmp_path)
    own = pixels_of(tmp_path / "00001.png").astype(float)
    flags = "--label blue --cfg 2 --depths 1 --out"
    call(edit, "vary 1", labelled_run, FEW, flags, tmp_path)
    original, *variations = shown.pop().values()
    assert abs(original[0] - own).max() <= 1
    # From pure noise, each has the label's colour.
    assert sum(image[0].mean((0, 1)).argmax() == 2 for image in variations) >= 7
    # An inversion has the label, too, so its noise is another.
    noises = []
    for label in ("blue", "2"):
        call(edit, "invert 1", labelled_run, FEW, "--label", label, "--out", tmp_path)
        noises.append(shown.pop()["its noise"])
    assert not np.array_equal(*noises)


def test_held_out_images_are_measured_with_their_own_labels(labelled_run, monkeypatch, capsys):
    seen = []
    forward = UNet.forward

    def record(self, x_t, t, label=None):
        seen.append(label.tolist())
        return forward(self, x_t, t, label)

    monkeypatch.setattr(UNet, "forward", record)
    call(evaluate, labelled_run, "--t-stride 200 --images 3")
    config = load_model(checkpoints_of(labelled_run)[-1]).config["diffusion"]
    image_set = load_images(config["dataset_name"], 16, inputs=["label"])
    split = split_images(image_set, "reference")
    indices = evenly_spaced(split.val_indices, 3)
    calls = len(seen) // len(indices)
    assert seen == [[image_set.inputs["label"][i]] for i in indices for _ in range(calls)]


def test_a_run_goes_on_only_with_its_labels(labelled_run, coloured, tmp_path, capsys):
    """And bits/dim of other labels are those of other data."""
    data = shutil.copytree(coloured, tmp_path / "data")
    flags = "--device cpu --dry-run --diffusion.epochs 41 --diffusion.dataset-name"
    resume = ["--resume", labelled_run, flags, data]
    moved = next((data / "a" / "2").iterdir())
    # The images and their names are the same, and so are their ids.
    bits = [labelled_run, "--images 2 --t-stride 100 --device cpu --out", tmp_path / "bits"]
    bits += ["--data", data]
    call(evaluate, *bits)
    assert "WARNING" not in capsys.readouterr().err
    for before, after in (
        (moved, data / "a" / "blue" / moved.name),
        (data / "a" / "2", data / "3"),
    ):
        before.rename(after)
        with refused("was trained with other labels or inputs than", ConfigError):
            call(train, *resume)
        if before == moved:
            call(evaluate, *bits)
            assert "it was trained with other labels or inputs;" in capsys.readouterr().err
            assert len([*(tmp_path / "bits").iterdir()]) == 2
        after.rename(before)
    call(train, *resume)


def test_weights_with_and_without_labels_begin_other_runs(
    labelled_run, coloured, tiny_run, tmp_path
):
    """Of the same labels they keep the table; else all begins as the model is without a label."""
    table = load_model(checkpoints_of(labelled_run)[-1]).weights[LABEL_TABLE]
    x_t, t = normal(0, 3, 3, 16, 16), torch.tensor([1, 50, 99])

    def network(data, init, *flags):
        return begun(data, "--init", init, *flags).ema_model

    def weights(*flags):
        return network(*flags).state_dict()

    assert torch.equal(weights(coloured, labelled_run, LABELS)[LABEL_TABLE], table)
    large = "--model.image-size 32 --model.dim-multiply 1,1,2 --model.transformer-layers 2"
    grown = weights(coloured, labelled_run, LABELS, large, "--diffusion.log-snr-shift -1.386")
    assert torch.equal(grown[LABEL_TABLE], table)
    assert LABEL_TABLE not in weights(coloured, labelled_run)
    before = load_denoiser(labelled_run).network(x_t, t)
    assert_close(network(coloured, labelled_run)(x_t, t), before)
    other = shutil.copytree(coloured, tmp_path / "other")
    (other / "a" / "blue").rename(other / "a" / "azure")
    begins = network(other, labelled_run, LABELS)
    for labels in (None, torch.tensor([0, 1, 2])):
        assert_close(begins(x_t, t, labels), before)
    assert torch.equal(weights(coloured, tiny_run, LABELS)[LABEL_TABLE], torch.zeros(4, 32))


def test_a_file_keeps_labels_and_a_folder_of_diffusers_has_none(labelled_run, tmp_path):
    file = tmp_path / "exported.safetensors"
    call(sample, labelled_run, "--export", file)
    assert load_model(file).provenance["label_names"] == ["2", "10", "blue"]
    call(sample, file, FEW, "--label blue --n 1 --out", tmp_path / "out")
    with refused("diffusers has no such model .it was trained with labels.; export it to a file"):
        call(sample, labelled_run, "--export", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    # A guide of other labels guides only what has none.
    checkpoint = Checkpoint(file)
    parts = {part: checkpoint.tensors(part) for part in checkpoint.digests}
    names = checkpoint.contents["run"]["label_names"]
    names[2] = "azure"
    write_tensors(file, parts, checkpoint.contents)
    with refused("cannot guide .*: other labels"):
        call(sample, labelled_run, FEW, "--label 2 --guide", file)
    call(sample, labelled_run, FEW, "--n 1 --guide", file, "--out", tmp_path / "guided")
    # Of a name without a row, no label could be drawn.
    names.append("pink")
    write_tensors(file, parts, checkpoint.contents)
    with refused("label_count is 3, but what it knows makes it 4", CheckpointError):
        call(sample, file, FEW, "--label pink")


def test_grids_of_a_training_show_the_labels_in_turn(labelled_run, tmp_path):
    """The truth is what sample.py draws with all labels, of the EMA weights after the last step."""
    grid = pixels_of(
        labelled_run / "samples" / f"step-{newest(labelled_run)['run']['step']:08}.png"
    )
    flags = "--sampler dpm++ --steps 4 --n 4 --label 2,10,blue --device cpu --precision float32"
    call(sample, labelled_run, flags, "--out", tmp_path)
    assert np.abs(grid.astype(float) - pixels_of(tmp_path / "grid.png")).max() <= 1
