"""train.py --init: a new run from the weights of another, or of a folder of diffusers."""

import shutil
import sys

import pytest
import torch

import sample
import train
from config import ConfigError
from functions.saved.checkpoint import load_model, load_weights
from functions.saved.run_folder import checkpoints_of
from functions.support.errors import UserError
from functions.training.opening import open_run
from tests.conftest import TINY, call, during, interrupt, newest, only_in, refused, words
from tests.small_training import same

# These flags of TINY do not belong to the weights, which bring the others with them.
TRAINING = [flag for flag in TINY.splitlines() if "--model" not in flag and "timesteps" not in flag]


def beginning_with(initial, pictures, runs, *flags, preset="faces"):
    """Return the words of train.py for a new run that begins with these weights."""
    start = [preset, "--init", initial, "--runs", runs, "--diffusion.dataset-name", pictures]
    return words(*start, *TRAINING, *flags)


@pytest.mark.slow
def test_a_run_begins_with_the_averaged_weights_of_another(tiny_run, pictures, tmp_path, capsys):
    """Network, T and betas are those of the weights, whatever the preset has.

    The new run's average begins exactly with the averaged weights, and moves little from them.
    """
    source = shutil.copytree(tiny_run, tmp_path / "source" / tiny_run.name)
    last = checkpoints_of(source)[-1]
    before = load_weights(last)
    runs = tmp_path / "runs"
    start = beginning_with(source, pictures, runs, "--resume auto", preset="cifar10")
    with open_run(start, "") as run:
        assert same(run.parts()["model"], run.parts()["ema"])
        assert same(run.parts()["ema"], before.weights)

    with pytest.raises(KeyboardInterrupt), during(7, interrupt):
        call(train, *start)
    # The same command continues the run, even if the other one has a newer checkpoint by now.
    last.rename(last.with_stem("step-00000011"))
    call(train, *start)
    contents = newest(only_in(runs))
    initial = contents["run"]["initial"]
    assert capsys.readouterr().out.count(f"begins as  {initial}") == 2
    assert f"{last}: {before}" in initial
    assert initial.endswith(f"; trained on {pictures} (held out then: by a hash of each name)")
    # Dropout is no property of the weights, so it is the preset's, as what is only a training's.
    free = {"dropout": 0.1, "lowest_resolution_size": None}
    assert contents["config"]["model"] == before.config["model"] | free
    assert contents["config"]["diffusion"]["learning_rate"] == 2e-4
    assert contents["config"]["diffusion"]["timesteps_diff"] == 100

    # In ten steps an average over 10,000 moves little.
    ema, model = (
        max((contents[part][name] - start).abs().max() for name, start in before.weights.items())
        for part in ("ema", "model")
    )
    assert 0 < ema < 0.01 * model


def test_weights_begin_a_run_with_images_of_another_size(tiny_run, pictures, tmp_path):
    start = beginning_with(tiny_run, pictures, tmp_path, "--model.image-size 32")
    before = load_weights(checkpoints_of(tiny_run)[-1])
    assert before.config["model"]["image_size"] == 16
    with open_run(start, "") as run:
        assert run.data.batch(0)[0].shape[1:] == (32, 32, 3)
        assert same(run.parts()["model"], before.weights)


@pytest.mark.slow
def test_a_network_of_diffusers_is_trained_on_and_resumed(
    their_folder, pictures, tmp_path, monkeypatch
):
    """Betas, T and objective are the folder's, whatever the preset has."""
    with pytest.raises(KeyboardInterrupt), during(9, interrupt):
        call(train, *beginning_with(their_folder, pictures, tmp_path, preset="faces-v"))
    killed = only_in(tmp_path)
    call(train, "--resume", killed)

    before = load_model(their_folder)
    contents = newest(killed)
    assert str(before) in contents["run"]["initial"]
    assert before.config["model"].items() <= contents["config"]["model"].items()
    for name in ("timesteps_diff", "betas", "objective"):
        assert contents["config"]["diffusion"][name] == before.config["diffusion"][name]
    for name, start in before.weights.items():
        assert not torch.equal(contents["ema"][name], start), name

    # It can be sampled, and be the beginning of another run; and its own package is needed.
    call(sample, killed, "--n 1 --steps 1")
    with open_run(beginning_with(killed, pictures, tmp_path), "") as run:
        assert same(run.parts()["model"], contents["ema"])
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for script, *flags in (
        (sample, their_folder),
        (sample, killed),
    ):
        with refused("^for models of diffusers, install its package: pip install 'diffusers"):
            call(script, *flags)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--model.image-size 32", "image_size is 16 for the weights of .* cannot be changed to 32"),
        ("--diffusion.labels true", "the network 'diffusers' takes no label"),
        (
            "--diffusion.timesteps-diff 7",
            "timesteps_diff is 20 for the weights of .* cannot be changed to 7",
        ),
        ("--diffusion.objective v", "objective is eps .* cannot be changed to v"),
    ],
)
def test_a_network_of_diffusers_stays_as_it_is(flags, sentence, their_folder, pictures, tmp_path):
    with pytest.raises((UserError, ConfigError), match=sentence):
        call(train, *beginning_with(their_folder, pictures, tmp_path, flags))
