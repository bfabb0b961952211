"""Images and a network of one's own, which no name and no config stand for."""

import math
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import sample
import train
from config import EXPERIMENTS, ConfigError, Experiment, OwnNetwork
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
    return from_array("mine", pixels, inputs=inputs, label_names=("a", "b"))


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


def test_own_run_with_labels_and_buffers_resumes_and_is_loaded(tmp_path, capsys):
    """A resumed run equals an uninterrupted one, and what is loaded draws with the averages."""
    straight = own_run(tmp_path / "straight")
    train.train(straight)
    assert "sample from it: load_denoiser" in capsys.readouterr().out
    cut = own_run(tmp_path / "cut")
    with during(3, terminate):
        assert not train.train(cut)
    assert f"continue with: a TrainingRun of {cut.folder} (docs" in capsys.readouterr().out
    resumed = own_run(tmp_path / "cut", checkpoint=intact_checkpoint(cut.folder))
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


class Plain(nn.Module):
    """A network that does not see t, always with the same weights at first."""

    def __init__(self, channels_out=3):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, channels_out, 3, padding=1)

    def forward(self, x_t, t):
        return self.last(self.norm(self.first(x_t)).relu())


PLAIN = from_array("mine", PIXELS)


def test_an_output_of_another_shape_is_an_error_and_not_broadcast(tmp_path):
    with pytest.raises(ValueError, match=r"output is \(16, 1, 8, 8\), for x_t of \(16, 3, 8, 8\)"):
        train.train(own_run(tmp_path, Plain(1), PLAIN))


def test_tied_weights_buffers_and_a_norm_in_eval_mode_are_kept(tmp_path):
    """A validation restores the mode of each module, and files have all numbers of buffers."""
    network = Plain()
    network.again = network.first
    network.register_buffer("many", torch.arange(4096))
    network.register_buffer("exact", torch.tensor([1 / 3], dtype=torch.float64))
    network.register_parameter("large", nn.Parameter(torch.tensor([1e6])))
    network.norm.eval()
    changes = dict(snapshot_every=4, validate_every=1, epochs=2)
    run = own_run(tmp_path, network, PLAIN, **changes)
    assert train.train(run)
    assert not network.norm.training and network.first.training
    assert same(network.norm.running_mean, torch.zeros(4))
    for kind in ("checkpoints", "snapshots"):
        saved = load_checkpoint(path_of(run.folder, kind, run.total_steps))["ema"]
        assert same(saved["many"], torch.arange(4096))
        assert same(saved["exact"], network.exact)
        assert same(saved["large"], torch.tensor([1e6]))
        assert same(saved["again.weight"], saved["first.weight"])
    assert saved["first.weight"].dtype == torch.float16


def of_a_part(network, lr, precision):
    """Return Adam for a part of the parameters."""
    return Adam(network.last.parameters(), lr)


def test_gradients_of_what_an_own_optimizer_does_not_move_are_no_part_of_a_step(
    tmp_path, monkeypatch
):
    """Else they would add up, and shorten the others by clipping."""
    monkeypatch.setitem(OPTIMIZERS, "part", of_a_part)
    straight, cut = (
        own_run(tmp_path / name, Plain(), PLAIN, optimizer="part", clip_grad_norm=0.01)
        for name in ("straight", "cut")
    )
    train.train(straight)
    with during(3, terminate):
        train.train(cut)
    resumed = own_run(
        tmp_path / "cut",
        Plain(),
        PLAIN,
        intact_checkpoint(cut.folder),
        optimizer="part",
        clip_grad_norm=0.01,
    )
    train.train(resumed)
    assert same(newest(straight.folder)["ema"], newest(cut.folder)["ema"])


@pytest.mark.parametrize("kind", [torch.optim.RMSprop, torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_that_cannot_skip_a_step_is_refused(kind, tmp_path, monkeypatch):
    row = {"other": lambda network, lr, precision: kind(network.parameters(), lr)}
    monkeypatch.setitem(OPTIMIZERS, "other", row["other"])
    with refused(f"{kind.__name__} does not skip a step: a row of OPTIMIZERS", ConfigError):
        own_run(tmp_path, Plain(), PLAIN, optimizer="other")


def test_folders_that_are_deleted_during_a_run_are_made_again(tmp_path):
    run = own_run(tmp_path, Plain(), PLAIN, snapshot_every=2)

    def delete():
        for kind in ("samples", "snapshots", "checkpoints"):
            shutil.rmtree(run.folder / kind, ignore_errors=True)

    with during(5, delete):
        assert train.train(run)
    for kind in ("samples", "snapshots", "checkpoints"):
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
    of_array = partial(from_array, "mine")
    for pixels in (PIXELS / 255, PIXELS[:, 1:]):
        with refused(r"they must be uint8 \(N, S, S, C\)", ValueError):
            of_array(pixels)
    for others in ({"names": ["a"] * 60}, {"inputs": {"label": np.zeros(59)}}):
        with refused("each image must have one name of its own, and one of each ", ValueError):
            of_array(PIXELS, **others)
    for label in (np.zeros(60), np.zeros((60, 1), int)):
        with refused(r"they must be integers \(N,\)", ValueError):
            of_array(PIXELS, inputs={"label": label})
    small = of_array(PIXELS, inputs={"label": np.zeros(60, np.uint8)}, label_names="a")
    assert small.inputs["label"].dtype == np.int64
    with refused("labels must be indices of label_names", ValueError):
        own_images(label_count=3)
    with refused(r"mine are \(4, 4, 3\) .* the network's \(8, 8, 3\)", ConfigError):
        own_run(tmp_path, images=own_images(PIXELS[:, :4, :4]))


def test_inputs_of_other_values_or_dtypes_have_another_hash():
    """The hash is that of their bytes, and not of a text of each number."""
    numbers = PIXELS.astype(np.float32)
    others = numbers, numbers + 1, numbers.astype(np.float64), numbers.reshape(60, -1)
    hashes = {from_array("mine", PIXELS, inputs={"n": n}).pixels_hash for n in others}
    assert len(hashes) == 4
