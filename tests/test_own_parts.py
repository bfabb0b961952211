"""Images and a network of one's own, which no name and no config stand for."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import sample
import train
from config import EXPERIMENTS, ConfigError, Experiment, OwnNetwork
from data.packed import ImageSet
from functions.optimizers import OPTIMIZERS, Adam
from functions.saved.loading import load_denoiser
from functions.saved.run_folder import intact_checkpoint, path_of
from functions.support.errors import CheckpointError
from functions.training.metrics import read_metrics
from functions.training.run import TrainingRun
from tests.conftest import CPU, call, during, load_checkpoint, newest, pixels_of, refused, terminate
from tests.small_training import same

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (60, 8, 8, 3), np.uint8)


class Normed(nn.Module):
    """A network with buffers: those of a batch norm, and a mask. It gets a label and a number."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.labels = nn.Embedding(3, 8)
        self.last = nn.Conv2d(8, 3, 3, padding=1)
        self.register_buffer("mask", torch.full((2, 2), -math.inf).triu(1))

    def forward(self, x_t, t, brightness, label=None):
        given = self.labels(label) if label is not None else 0
        given = given + brightness[:, None].expand(-1, 8)
        return self.last((self.norm(self.first(x_t)) + given[..., None, None]).relu())


class Bare(nn.Conv2d):
    """A network that does not see t."""

    def forward(self, x_t, t):
        return super().forward(x_t)


def own_run(folder, checkpoint=None, **changes):
    """Return a run of `Normed` on random images with two labels."""
    inputs = {"label": np.arange(60) % 2, "brightness": PIXELS.mean((1, 2, 3), np.float32) / 255}
    images = ImageSet.from_array(
        "mine", PIXELS, inputs=inputs, facts={"label_names": ("even", "odd")}
    )
    settings = {"epochs": 2, "checkpoint_every": 2, "precision": "float32", "sample_every": 3}
    settings |= {"grid_steps": 2, "validation_samples": 8, "dataset_name": "mine"} | changes
    experiment = Experiment(
        EXPERIMENTS["faces"].override(**settings).diffusion, OwnNetwork("Normed", 8, 3)
    )
    torch.manual_seed(0)
    return TrainingRun("mine", experiment, images, Normed(), folder, CPU, checkpoint)


def two_groups(network, lr, precision):
    """Return Adam whose second group of parameters has a tenth of the learning rate."""
    first, *others = network.children()
    parameters = [p for layer in others for p in layer.parameters()]
    return Adam([{"params": first.parameters()}, {"params": parameters, "lr": lr / 10}], lr)


def test_own_run_with_labels_buffers_and_groups_resumes_and_is_loaded(
    tmp_path, capsys, monkeypatch
):
    """A resumed run equals an uninterrupted one, and what is loaded draws with the averages."""
    monkeypatch.setitem(OPTIMIZERS, "two groups", two_groups)
    of_run = partial(own_run, optimizer="two groups")
    straight = of_run(tmp_path / "straight")
    train.train(straight)
    rates = [group["lr"] for group in straight.optimizer.param_groups]
    assert rates == pytest.approx([straight.config.rate_of(5, 6) / n for n in (1, 10)])
    assert "sample from it: load_denoiser" in capsys.readouterr().out
    cut = of_run(tmp_path / "cut")
    with during(3, terminate):
        assert not train.train(cut)
    assert f"continue with: a TrainingRun of {cut.folder} (docs" in capsys.readouterr().out
    resumed = of_run(tmp_path / "cut", intact_checkpoint(cut.folder))
    assert resumed.step == 3
    train.train(resumed)
    assert same(newest(straight.folder)["ema"], newest(cut.folder)["ema"])

    saved = newest(straight.folder)
    assert saved["config"]["model"] == {"class_name": "Normed", "image_size": 8, "channels": 3}
    assert not torch.equal(saved["ema"]["norm.running_mean"], torch.zeros(8))
    assert torch.equal(saved["ema"]["mask"], Normed().mask)
    # A grid is drawn with the numbers of held-out images.
    assert (straight.folder / "samples" / "step-00000003.png").exists()
    network = load_denoiser(straight.folder, network=Normed()).network
    assert same(dict(network.state_dict()), saved["ema"])
    with refused("its network, 'Normed', is not built by a config", CheckpointError):
        call(sample, straight.folder)
    with refused("its network, 'Normed', is not built by a config", ConfigError):
        call(train, "--resume", straight.folder)
    with refused("weights are missing or unknown", CheckpointError):
        load_denoiser(straight.folder, network=nn.Conv2d(3, 3, 1))


def spoil_all(model, x_0):
    return x_0 * math.nan


def spoil_a_buffer(model, x_0):
    model.norm.running_var.fill_(math.inf)
    return x_0


@pytest.mark.parametrize("spoil", [spoil_all, spoil_a_buffer])
def test_skipped_step_leaves_buffers_and_their_copies(spoil, tmp_path, monkeypatch):
    """The loss of the third step is spoilt, or its gradient is finite but a buffer is not."""
    run = own_run(tmp_path, checkpoint_every=1, keep_checkpoints=9, log_every=1, validate_every=1)
    original = train.denoising_loss

    def spoilt(denoiser, x_0, *others):
        x_0 = spoil(run.model, x_0) if run.step == 2 else x_0
        return original(denoiser, x_0, *others)

    monkeypatch.setattr(train, "denoising_loss", spoilt)
    assert train.train(run)
    before, after, following = (
        load_checkpoint(path_of(run.folder, "checkpoints", step)) for step in (2, 3, 4)
    )
    assert same(before["model"], after["model"])
    for name, _ in Normed().named_buffers():
        assert same(before["ema"][name], after["ema"][name])
    assert not same(after["model"]["norm.running_var"], following["model"]["norm.running_var"])
    rows = read_metrics(run.folder / "metrics.csv")
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1, 1, 1]
    assert all(math.isfinite(row["val_loss_ema"]) for row in rows)


@pytest.mark.parametrize("channels", [2, 4])
def test_images_of_other_channels_are_trained_and_their_first_ones_shown(channels, tmp_path):
    images = ImageSet.from_array("mine", RNG.integers(0, 256, (60, 8, 8, channels), np.uint8))
    settings = {"epochs": 1, "sample_every": 3, "grid_steps": 2, "precision": "float32"}
    experiment = EXPERIMENTS["faces"].override(**settings, validation_samples=8)
    experiment = replace(experiment, model=OwnNetwork("Conv", 8, channels))
    network = Bare(channels, channels, 3, padding=1)
    run = TrainingRun("mine", experiment, images, network, tmp_path, CPU)
    assert train.train(run)
    grid = pixels_of(run.folder / "samples" / "step-00000003.png")
    assert grid.shape[2:] == ((3,) if channels > 2 else ())


def test_what_does_not_fit_is_refused(tmp_path):
    for pixels in (PIXELS / 255, PIXELS[:, 1:]):
        with pytest.raises(ValueError, match=r"they must be uint8 \(N, S, S, C\)"):
            ImageSet.from_array("mine", pixels)
    with pytest.raises(ValueError, match="each image must have one name of its own"):
        ImageSet.from_array("mine", PIXELS, names=["a"] * 60)
    with pytest.raises(ValueError, match="and one of each input"):
        ImageSet.from_array("mine", PIXELS, inputs={"label": np.zeros(59)})
    experiment = EXPERIMENTS["faces"]
    own = replace(experiment, model=OwnNetwork("Normed", 8, 3))
    for labels, names, sentence in (
        ([*range(60)], "ab", "mine: labels must be indices of the fact label_names"),
        ([0] * 60, "", "labels must be indices"),
        ([0] * 60, "ab", "mine: no training image has the label 'b'"),
    ):
        inputs = {"label": labels}
        images = ImageSet.from_array("mine", PIXELS, inputs=inputs, facts={"label_names": names})
        with refused(sentence):
            TrainingRun("mine", own, images, Normed(), tmp_path, CPU)
    images = ImageSet.from_array("mine", PIXELS)
    with refused(r"mine are \(8, 8, 3\) .* the network's \(32, 32, 3\)", ConfigError):
        TrainingRun("mine", experiment, images, Normed(), tmp_path, CPU)
