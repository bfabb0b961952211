"""train.py --init: a new run from the weights of another, or of a folder of diffusers."""

import json
import math
import shutil
import sys

import pytest
import torch
from diffusers import UNet2DModel

import sample
import train
from config import EXPERIMENTS, ConfigError, ModelConfig
from data.pixels import to_uint8
from functions.samplers import ddim_sample
from functions.saved.checkpoint import load_weights
from functions.saved.loading import load_denoiser, load_model
from functions.saved.run_folder import checkpoints_of
from functions.support.random_numbers import image_noise
from functions.training.opening import open_run
from models.growing import LOG_SNR_SHIFT, grown_arguments, grown_weights
from models.unet import UNet
from tests.conftest import CPU, TINY, call, during, interrupt, newest, only_in, refused, samples_of
from tests.small_training import same

# These flags of TINY do not belong to the weights, which bring the others with them.
TRAINING = [flag for flag in TINY.splitlines() if "--model" not in flag and "timesteps" not in flag]


@pytest.mark.slow
def test_a_run_begins_with_the_averaged_weights_of_another(tiny_run, pictures, tmp_path):
    """Network, T and betas are those of the weights, whatever the preset has.

    The new run's average begins exactly with the averaged weights, and moves little from them.
    """
    before = load_weights(checkpoints_of(tiny_run)[-1])
    flags = ["--diffusion.dataset-name", pictures, "--runs", tmp_path, *TRAINING]
    flags += ["--model.image-size 16 --init", tiny_run]
    args = call(train, "cifar10", *flags, function="parse_flags")
    with open_run(args) as run:
        pass
    assert same(run.parts()["model"], run.parts()["ema"])
    assert same(run.parts()["ema"], before.weights)
    assert f"begins as  {tiny_run}" in run.describe()

    # The run says where it began.
    assert train.train(run)
    contents = newest(run.folder)
    initial = contents["run"]["initial"]
    assert str(tiny_run) in initial
    assert before.digest[:16] in initial
    assert initial.endswith(f"; trained on {pictures} (held out then: by a hash of each name)")
    # Dropout is no property of the weights, so it is the preset's.
    assert contents["config"]["model"] == before.config["model"] | {"dropout": 0.1}
    assert contents["config"]["diffusion"]["timesteps_diff"] == 100

    # In ten steps an average over 10,000 moves little.
    moved = {}
    for part in ("ema", "model"):
        weights = contents[part]
        moved[part] = max((weights[n] - start).abs().max() for n, start in before.weights.items())
    assert 0 < moved["ema"] < 0.01 * moved["model"]


def begin_with(folder, pictures, runs, *flags, preset="faces"):
    """Train a network of diffusers on; return the run's folder."""
    start = [preset, "--runs", runs, "--diffusion.dataset-name", pictures]
    call(train, *start, "--model.image-size 16", *TRAINING, "--init", folder, *flags)
    return only_in(runs)


@pytest.mark.slow
def test_a_network_of_diffusers_is_trained_on_and_resumed(
    their_folder, pictures, tmp_path, monkeypatch
):
    """Betas, T and objective are the folder's, whatever the preset has."""
    with pytest.raises(KeyboardInterrupt), during(9, interrupt):
        begin_with(their_folder, pictures, tmp_path / "killed", preset="faces-v")
    killed = only_in(tmp_path / "killed")
    call(train, "--resume", killed)

    before = load_model(their_folder)
    contents = newest(killed)
    assert str(before) in contents["run"]["initial"]
    assert contents["config"]["model"] == before.config["model"]
    for name in ("timesteps_diff", "betas", "objective"):
        assert contents["config"]["diffusion"][name] == before.config["diffusion"][name]
    config = json.loads((killed / "config.json").read_text())
    assert UNet2DModel(**config["config"]["model"]["unet_2d_model"]).config.act_fn == "gelu"
    assert {path.name for path in (killed / "samples").iterdir()} >= {"step-00000010.png"}
    for name, start in before.weights.items():
        assert not torch.equal(contents["ema"][name], start), name

    flags = "--sampler ddim --steps 5 --n 1 --individual --device cpu --precision float32 --out"
    call(sample, killed, flags, tmp_path / "out")
    noise = image_noise(0, [0], (3, 16, 16), CPU, "image")
    expected = to_uint8(ddim_sample(load_denoiser(killed), noise(), 5))
    assert (samples_of(tmp_path / "out") == expected).all()

    # It can be the beginning of another run, and its own package is needed.
    begin_with(killed, pictures, tmp_path / "again")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for script, *flags in (
        (sample, their_folder),
        (sample, killed),
        (train, "--diffusion.epochs 3 --resume", killed),
    ):
        with refused("^for models of diffusers, install its package: pip install 'diffusers"):
            call(script, *flags)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--model.image-size 32", "image_size is 32; it must be 16 for the weights of"),
        ("--model.base-dim 8", "neither DiffusionConfig nor DiffusersNetwork has base_dim"),
        ("--diffusion.labels true", "a network of diffusers gets no label here"),
        ("--diffusion.timesteps-diff 7", "20 betas; they must be 7, .* leave it as it is"),
        ("--diffusion.objective v", "objective is eps .* cannot be changed to v"),
    ],
)
def test_a_network_of_diffusers_stays_as_it_is(flags, sentence, their_folder, pictures, tmp_path):
    with refused(sentence, ConfigError):
        begin_with(their_folder, pictures, tmp_path, flags)


@pytest.mark.slow
def test_a_grown_run_forgets_its_empty_level(tiny_run, pictures, tmp_path):
    """The weights made images of 16 x 16, and grow a level for 32 x 32."""
    flags = ["--init", tiny_run, "--model.image-size 32 --runs", tmp_path]
    call(train, "faces", *flags, "--diffusion.dataset-name", pictures, *TRAINING)
    contents = newest(only_in(tmp_path))
    # So it is also when it is resumed.
    assert contents["run"]["ema_ramp"]
    assert "grown from 16 px; trained on " in contents["run"]["initial"]
    model = contents["config"]["model"]
    assert (model["image_size"], model["lowest_resolution_size"]) == (32, 8)
    assert (model["dim_multiply"], model["transformer_layers"]) == ([1, 1, 2], [2])
    assert contents["config"]["diffusion"]["log_snr_shift"] == pytest.approx(-2 * math.log(2), 1e-3)
    # After 10 steps, an average of decay 0.998 without a ramp has 98% of its first weights, and
    # with it the product of (1 + n) / (10 + n), about nothing.
    name = "down.0.downsample.conv.weight"
    small = load_weights(checkpoints_of(tiny_run)[-1])
    network = UNet(**grown_arguments(vars(small.model)))
    begin = grown_weights(small.weights, network)[name]
    assert (contents["ema"][name] - begin).norm() > 0.5 * (contents["model"][name] - begin).norm()


def test_a_preset_of_twice_the_size_and_a_level_more_is_what_grows():
    """`ffhq-128` is the network that a model of `ffhq-64` grows into, with its schedule."""
    small = EXPERIMENTS["ffhq-64"]
    grown = ModelConfig(**grown_arguments(vars(small.model)))
    assert grown == EXPERIMENTS["ffhq-128"].model
    assert EXPERIMENTS["ffhq-128"].diffusion.log_snr_shift == LOG_SNR_SHIFT


@pytest.mark.slow
def test_a_resumed_run_remembers_where_it_began(tiny_run, trained, tmp_path, capsys):
    source = shutil.copytree(tiny_run, tmp_path.with_name("source") / tiny_run.name)
    with pytest.raises(KeyboardInterrupt), during(7, interrupt):
        trained("--init", source)

    # The same command continues the run, even if the other one has a newer checkpoint by now.
    last = checkpoints_of(source)[-1]
    last.rename(last.with_stem("step-00000011"))
    run = trained("--resume auto --init", source)
    initial = newest(run)["run"]["initial"]
    assert capsys.readouterr().out.count(f"begins as  {initial}") == 2
    assert len([*run.parent.iterdir()]) == 1
    assert newest(run)["run"]["step"] == 10
    assert not newest(run)["run"]["ema_ramp"]
