"""Images and a network of one's own, which no name and no config stand for."""

import math
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

import sample
import train
from config import EXPERIMENTS, ConfigError, Experiment, ModelConfig
from data.arrays import from_array
from functions.optimizers import OPTIMIZERS
from functions.saved.checkpoint import Checkpoint
from functions.saved.loading import load_denoiser
from functions.saved.run_folder import path_of
from functions.support.errors import CheckpointError
from functions.training.resuming import intact_checkpoint
from functions.training.run import TrainingRun
from models.unet import UNet
from tests.conftest import CPU, call, during, load_checkpoint, newest, pixels_of, refused
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


def of_a_part(network, lr):
    """Return Adam for a part of the parameters."""
    return torch.optim.Adam(network.last.parameters(), lr)


@pytest.mark.parametrize("changes", [{}, {"optimizer": "part", "clip_grad_norm": 0.01}])
def test_own_run_with_labels_and_buffers_resumes_and_is_loaded(changes, tmp_path, monkeypatch):
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
    assert not train.train(cut, lambda: cut.step == 3)
    checkpoint = intact_checkpoint(cut.folder)
    resumed = own_run(tmp_path / "cut", images=images, checkpoint=checkpoint, **changes)
    assert resumed.step == 3
    train.train(resumed)
    saved = newest(straight.folder)
    assert same(saved["ema"], newest(cut.folder)["ema"])

    assert not torch.equal(saved["ema"]["norm.running_mean"], torch.zeros(8))
    assert torch.equal(saved["ema"]["mask"], Normed().mask)
    given = Normed()
    network = load_denoiser(straight.folder, network=given).network
    # It may be one that is being trained, and keeps its own weights.
    assert same(dict(given.state_dict()), dict(Normed().state_dict()))
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


class Counting(torch.optim.SGD):
    """SGD with momentum, whose state has plain numbers, too."""

    def step(self):
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["steps made"] = self.state[p].get("steps made", 0) + 1


def in_two_groups(network, lr):
    """Return AdamW without decay, and with a tenth of the rate, for biases and norms."""
    matrices, others = (
        [p for p in network.parameters() if (p.ndim > 1) == large] for large in (True, False)
    )
    plain = {"params": others, "weight_decay": 0.0, "lr": lr / 10}
    return torch.optim.AdamW([{"params": matrices}, plain], lr, weight_decay=0.1)


OTHERS = {
    "sgd": lambda network, lr: Counting(network.parameters(), lr, momentum=0.9),
    "adamw": in_two_groups,
    "muon": OPTIMIZERS["muon"],
}


@pytest.mark.parametrize("optimizer", OTHERS)
def test_any_optimizer_is_resumed_bit_for_bit_and_skips_bad_steps(optimizer, tmp_path, monkeypatch):
    """The second step has a gradient that is no number, and the run is cut after the third.

    The first step is skipped as well, so that it has no state yet when it is saved.
    """
    monkeypatch.setitem(OPTIMIZERS, optimizer, OTHERS[optimizer])
    original = train.denoising_loss
    bad = [0, 2]

    def spoiled(denoiser, x_0, t, noise):
        losses = original(denoiser, x_0, t, noise)
        if step_of[0] in bad:
            losses["loss"] = losses["loss"] * math.nan
        step_of[0] += 1
        return losses

    step_of = [0]
    monkeypatch.setattr(train, "denoising_loss", spoiled)
    changes = {"optimizer": optimizer, "checkpoint_every": 1, "keep_checkpoints": 99}
    changes |= {"validate_every": 99, "sample_every": 0, "batch_size": 9}

    def new(name, checkpoint=None):
        torch.manual_seed(0)
        network = UNet(8, 3, None, (1,), (), 16, norm_groups=4)
        return own_run(tmp_path / name, network, checkpoint=checkpoint, **changes)

    straight = new("straight")
    assert train.train(straight)
    assert straight.total_steps == 12
    saved = [
        load_checkpoint(path_of(straight.folder, "checkpoints", step)) for step in range(1, 13)
    ]
    assert [each["window"]["skipped_steps"] for each in saved[:4]] == [1, 1, 2, 2]
    assert same(saved[1]["model"], saved[2]["model"])
    assert same(saved[1]["optimizer"], saved[2]["optimizer"])
    assert not same(saved[2]["model"], saved[3]["model"])

    for cut_after in (1, 4):
        checkpoint = Checkpoint(path_of(straight.folder, "checkpoints", cut_after))
        step_of = [cut_after]
        resumed = new("straight", checkpoint)
        assert resumed.step == cut_after
        assert train.train(resumed)
        assert same(newest(resumed.folder), saved[-1])
    if optimizer == "adamw":
        rates = [group["lr"] for group in resumed.optimizer.param_groups]
        assert rates[1] == pytest.approx(rates[0] / 10)


def test_a_run_in_a_thread_leaves_signals_and_streams_as_they_were(tmp_path):
    """As in a notebook; no handler can be set there."""
    before = signal.getsignal(signal.SIGINT), sys.stdout, sys.stderr
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(train.train, own_run(tmp_path)).result()
    assert (signal.getsignal(signal.SIGINT), sys.stdout, sys.stderr) == before


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
