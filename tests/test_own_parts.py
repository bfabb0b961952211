"""Images and a network of one's own, which no name and no config stand for."""

import math
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


def own_images(pixels=PIXELS, label_count=2, **inputs):
    """Return random images with labels, and with other inputs."""
    inputs["label"] = np.arange(60) % label_count
    return ImageSet.from_array("mine", pixels, inputs=inputs, label_names=("a", "b"))


def own_run(folder, network=None, images=None, checkpoint=None, **changes):
    """Return a run, by default of `Normed` on random images with all that it gets."""
    torch.manual_seed(0)
    network = network or Normed()
    images = images or own_images(brightness=PIXELS.mean((1, 2, 3), np.float32) / 255)
    settings = {"epochs": 2, "checkpoint_every": 2, "precision": "float32", "sample_every": 3}
    settings |= {"grid_steps": 2, "validation_samples": 8} | changes
    model = OwnNetwork(type(network).__name__, 8, images.images.shape[3])
    experiment = Experiment(EXPERIMENTS["faces"].override(**settings).diffusion, model)
    return TrainingRun("mine", experiment, images, network, folder, CPU, checkpoint)


def two_groups(network, lr, precision):
    """Return Adam whose second group of parameters has a tenth of the learning rate."""
    first, *others = network.parameters()
    return Adam([{"params": [first]}, {"params": others, "lr": lr / 10}], lr)


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
    resumed = of_run(tmp_path / "cut", checkpoint=intact_checkpoint(cut.folder))
    assert resumed.step == 3
    train.train(resumed)
    saved = newest(straight.folder)
    assert same(saved["ema"], newest(cut.folder)["ema"])

    assert not torch.equal(saved["ema"]["norm.running_mean"], torch.zeros(8))
    assert torch.equal(saved["ema"]["mask"], Normed().mask)
    network = load_denoiser(straight.folder, network=Normed()).network
    assert same(dict(network.state_dict()), saved["ema"])
    for error, script, flags in ((CheckpointError, sample, ""), (ConfigError, train, "--resume")):
        with refused("its network, 'Normed', is not built by a config", error):
            call(script, flags, straight.folder)


def test_skipped_step_leaves_buffers_and_their_copies(tmp_path, monkeypatch):
    """The gradient of the third step is spoilt; that of the fifth is finite, but a buffer is not.

    The third one's buffers are finite, but no longer as they were.
    """
    run = own_run(tmp_path, checkpoint_every=1, keep_checkpoints=9, log_every=1, validate_every=1)
    original = train.denoising_loss

    def spoilt(*args):
        if run.step == 4:
            run.model.norm.running_var.fill_(math.inf)
        return original(*args) * (math.nan if run.step == 2 else 1)

    monkeypatch.setattr(train, "denoising_loss", spoilt)
    assert train.train(run)
    steps = [load_checkpoint(path_of(run.folder, "checkpoints", step)) for step in range(1, 7)]
    for before, after, following in (steps[1:4], steps[3:6]):
        assert same(before["model"], after["model"])
        for name, _ in Normed().named_buffers():
            assert same(before["ema"][name], after["ema"][name])
        assert not same(after["model"]["norm.running_var"], following["model"]["norm.running_var"])
    rows = read_metrics(run.folder / "metrics.csv")
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1, 2, 2]
    assert all(math.isfinite(row["val_loss_ema"]) for row in rows)


@pytest.mark.parametrize("channels", [2, 4])
def test_images_of_other_channels_are_trained_and_their_first_ones_shown(channels, tmp_path):
    class Bare(nn.Conv2d):
        """A network that does not see t."""

        def forward(self, x_t, t):
            return super().forward(x_t)

    images = ImageSet.from_array("mine", PIXELS[..., [0, 1, 2, 0][:channels]])
    run = own_run(tmp_path, Bare(channels, channels, 1), images)
    assert train.train(run)
    grid = pixels_of(run.folder / "samples" / "step-00000003.png")
    assert grid.shape[2:] == ((3,) if channels > 2 else ())


def test_what_does_not_fit_is_refused(tmp_path):
    of_array = partial(ImageSet.from_array, "mine")
    for pixels in (PIXELS / 255, PIXELS[:, 1:]):
        with refused(r"they must be uint8 \(N, S, S, C\)", ValueError):
            of_array(pixels)
    for others in ({"names": ["a"] * 60}, {"inputs": {"label": np.zeros(59)}}):
        with refused("each image must have one name of its own, and one of each ", ValueError):
            of_array(PIXELS, **others)
    with refused("mine: labels must be indices of label_names"):
        own_run(tmp_path, images=own_images(label_count=3))
    with refused(r"mine are \(4, 4, 3\) .* the network's \(8, 8, 3\)", ConfigError):
        own_run(tmp_path, images=own_images(PIXELS[:, :4, :4]))
