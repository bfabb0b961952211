"""Images and a network of one's own, which no name and no config stand for."""

import math
import shutil
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import nn

import sample
import train
from config import EXPERIMENTS, ConfigError, Experiment, ModelConfig
from data.arrays import from_array
from functions.optimizers import OPTIMIZERS, Adam
from functions.saved.loading import load_denoiser
from functions.saved.run_folder import path_of
from functions.support.errors import CheckpointError
from functions.training.resuming import intact_checkpoint
from functions.training.run import TrainingRun
from tests.conftest import CPU, call, during, load_checkpoint, newest, pixels_of, refused, terminate
from tests.small_training import same

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (60, 8, 8, 3), np.uint8)


class Normed(nn.Module):
    """A network with buffers: those of a batch norm, and a mask. It may get a label and a number.

    It does not see t, and always has the same weights at first.
    """

    def __init__(self, channels_out=3):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.labels = nn.Embedding(3, 8)
        self.last = nn.Conv2d(8, channels_out, 3, padding=1)
        self.register_buffer("mask", torch.full((2, 2), -math.inf).triu(1))

    def forward(self, x_t, t, brightness=None, label=None):
        features = self.norm(self.first(x_t))
        if label is not None:
            features = features + self.labels(label)[..., None, None]
        if brightness is not None:
            features = features + brightness.view(-1, 1, 1, 1)
        return self.last(features.relu())


PLAIN = from_array("mine", PIXELS)


def own_run(folder, network=None, images=PLAIN, checkpoint=None, **changes):
    """Return a run, by default of `Normed` on random images alone."""
    network = network or Normed()
    settings = {"epochs": 2, "checkpoint_every": 2, "precision": "float32", "sample_every": 3}
    settings |= {"grid_steps": 2, "validation_samples": 8} | changes
    name = type(network).__name__
    model = ModelConfig(image_size=8, channels=images.images.shape[3], network=name)
    experiment = Experiment(EXPERIMENTS["faces"].override(**settings).diffusion, model)
    return TrainingRun("mine", experiment, images, network, folder, CPU, checkpoint)


def of_a_part(network, lr, precision):
    """Return Adam for a part of the parameters."""
    return Adam(network.last.parameters(), lr)


@pytest.mark.parametrize("changes", [{}, {"optimizer": "part", "clip_grad_norm": 0.01}])
def test_own_run_with_labels_and_buffers_resumes_and_is_loaded(
    changes, tmp_path, monkeypatch, capsys
):
    """A resumed run equals an uninterrupted one, and what is loaded draws with the averages.

    Gradients of what an own optimizer does not move are no part of a step: else they would add up,
    and shorten the others by clipping.
    """
    monkeypatch.setitem(OPTIMIZERS, "part", of_a_part)
    # PyTorch looks up no index of this dtype.
    label = np.arange(60, dtype=np.uint8) % 2
    inputs = {"label": label, "brightness": PIXELS.mean((1, 2, 3), np.float32) / 255}
    images = from_array("mine", PIXELS, inputs=inputs, label_names="ab")
    straight, cut = (
        own_run(tmp_path / name, images=images, **changes) for name in ("straight", "cut")
    )
    train.train(straight)
    assert "sample from it: load_denoiser" in capsys.readouterr().out
    with during(3, terminate):
        assert not train.train(cut)
    assert f"continue with: a TrainingRun of {cut.folder} (docs" in capsys.readouterr().out
    checkpoint = intact_checkpoint(cut.folder)
    resumed = own_run(tmp_path / "cut", images=images, checkpoint=checkpoint, **changes)
    assert resumed.step == 3
    train.train(resumed)
    saved = newest(straight.folder)
    assert same(saved["ema"], newest(cut.folder)["ema"])

    assert not torch.equal(saved["ema"]["norm.running_mean"], torch.zeros(8))
    assert torch.equal(saved["ema"]["mask"], Normed().mask)
    network = load_denoiser(straight.folder, network=Normed()).network
    assert same(dict(network.state_dict()), saved["ema"])
    for error, script, flags in ((CheckpointError, sample, ""), (ConfigError, train, "--resume")):
        with refused("its network, 'Normed', is none of models/networks.py", error):
            call(script, flags, straight.folder)


def test_the_newest_run_that_draws_alone_is_drawn(tiny_run, details_run, here, capsys):
    """A run from Python, and one that enlarges, are newer, and are passed over in a sentence."""
    shutil.copytree(tiny_run, f"runs/{tiny_run.name}")
    shutil.copytree(details_run, "runs/ffhq-details-29990101-120000")
    run = own_run(here / "runs")
    train.train(run)
    run.folder.rename("runs/mine-29990101-120001")
    capsys.readouterr()
    call(sample, "--device cpu -n 1 --steps 1")
    own, details, taken, *_ = capsys.readouterr().out.splitlines()
    assert own.startswith("runs/mine-29990101-120001 is passed over: its network, 'Normed', is no")
    assert details == "runs/ffhq-details-29990101-120000 is passed over: its network needs low"
    assert taken.startswith(f"runs/{tiny_run.name}/checkpoints/step-00000010.safetensors: EMA")


def test_an_output_of_another_shape_is_an_error_and_not_broadcast(tmp_path):
    with pytest.raises(ValueError, match=r"output is \(16, 1, 8, 8\), for x_t of \(16, 3, 8, 8\)"):
        train.train(own_run(tmp_path, Normed(1)))


def test_tied_weights_buffers_and_a_norm_in_eval_mode_are_kept(tmp_path):
    """A validation restores the mode of each module, and files have all numbers of buffers."""
    network = Normed()
    network.again = network.first
    network.register_buffer("many", torch.arange(4096))
    network.register_buffer("exact", torch.tensor([1 / 3], dtype=torch.float64))
    network.register_parameter("large", nn.Parameter(torch.tensor([1e6])))
    network.norm.eval()
    run = own_run(tmp_path, network, snapshot_every=4, validate_every=1)
    assert train.train(run)
    assert not network.norm.training and network.first.training
    assert same(network.norm.running_mean, torch.zeros(8))
    for kind in ("checkpoints", "snapshots"):
        saved = load_checkpoint(path_of(run.folder, kind, run.total_steps))["ema"]
        assert same(saved["many"], torch.arange(4096))
        assert same(saved["exact"], network.exact)
        assert same(saved["large"], torch.tensor([1e6]))
        assert same(saved["again.weight"], saved["first.weight"])


def test_an_optimizer_that_cannot_skip_a_step_is_refused(tmp_path, monkeypatch):
    other = Mock(return_value=torch.optim.SGD(Normed().parameters()))
    monkeypatch.setitem(OPTIMIZERS, "other", other)
    with refused("SGD does not skip a step: a row of OPTIMIZERS", ConfigError):
        own_run(tmp_path, optimizer="other")


def test_folders_that_are_deleted_during_a_run_are_made_again(tmp_path):
    run = own_run(tmp_path, snapshot_every=2)

    kinds = ("samples", "snapshots", "checkpoints")

    def delete():
        for kind in kinds:
            shutil.rmtree(run.folder / kind, ignore_errors=True)

    with during(5, delete):
        assert train.train(run)
    for kind in kinds:
        assert path_of(run.folder, kind, run.total_steps).exists()


@pytest.mark.parametrize("channels", [2, 4])
def test_images_of_other_channels_are_trained_and_their_first_ones_shown(channels, tmp_path):
    class Bare(nn.Conv2d):
        """A network that does not see t."""

        def forward(self, x_t, t):
            return super().forward(x_t)

    images = from_array("mine", PIXELS[..., [0, 1, 2, 0][:channels]])
    run = own_run(tmp_path, Bare(channels, channels, 1), images)
    assert train.train(run)
    grid = pixels_of(run.folder / "samples" / "step-00000003.png")
    assert grid.shape[2:] == ((3,) if channels > 2 else ())


def test_what_does_not_fit_is_refused(tmp_path):
    for images, sentence in (
        ([PIXELS / 255], r"they must be uint8 \(N, S, S, C\)"),
        ([PIXELS[:, 1:]], r"they must be uint8 \(N, S, S, C\)"),
        ([PIXELS, ["a"] * 60], "each image must have one name of its own, and one of each "),
        ([PIXELS, None, {"label": np.zeros(59)}], "one name of its own, and one of each "),
        ([PIXELS, None, {"label": np.zeros(60)}], r"they must be integers \(N,\)"),
        ([PIXELS, None, {"label": np.zeros((60, 1), int)}], r"they must be integers \(N,\)"),
        ([PIXELS, None, {"label": np.arange(60)}, "ab"], "must be indices of label_names"),
    ):
        with refused(sentence, ValueError):
            from_array("mine", *images)
    with refused(r"mine are \(4, 4, 3\) .* the network's \(8, 8, 3\)", ConfigError):
        own_run(tmp_path, images=from_array("mine", PIXELS[:, :4, :4]))


def test_inputs_of_other_values_or_dtypes_have_another_hash():
    """The hash is that of their bytes, and not of a text of each number."""
    numbers = PIXELS.astype(np.float32)
    others = numbers, numbers + 1, numbers.astype(np.float64), numbers.reshape(60, -1)
    hashes = {from_array("mine", PIXELS, inputs={"n": n}).pixels_hash for n in others}
    assert len(hashes) == 4
