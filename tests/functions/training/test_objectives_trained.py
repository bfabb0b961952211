"""Trainings with objective v and cosine betas, and with an objective that a test registers."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import sample
import train
from functions.denoiser import OBJECTIVES
from functions.noise_scheduler import NoiseScheduler
from functions.support import loading
from functions.training.metrics import read_metrics
from tests.conftest import call, train_tiny
from tests.functions.test_objectives import X_0


def seen_in(pictures, runs, *flags):
    """Return a run with some flags, and its t, losses and x_0, each (10 steps, ...)."""
    original = train.denoising_loss
    seen = []

    def seeing(denoiser, x_0, t, noise):
        losses = original(denoiser, x_0, t, noise)
        seen.append((t, losses.detach(), x_0))
        return losses

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "denoising_loss", seeing)
        run = train_tiny(pictures, runs, *flags, name="faces-v")
    passes = zip(*seen, strict=True)
    return run, *(torch.cat(batches).numpy().reshape(10, -1) for batches in passes)


def numbers(run, column):
    """Return the numbers of a column of metrics.csv by their steps, without empty cells."""
    rows = read_metrics(run / "metrics.csv")
    return {row["step"]: row[column] for row in rows if row[column] is not None}


def assert_logged(run, losses, errors):
    """Compare metrics.csv with the losses and the errors of eps, both (10 steps, batch)."""
    # A row is written after each of these steps, with the mean since the row before.
    logged = (0, 2, 4, 5, 6, 8, 10)
    for column, values in (("loss", losses), ("eps_error", errors)):
        means = {last: values[first:last].mean() for first, last in pairwise(logged)}
        assert numbers(run, column) == pytest.approx(means, rel=1e-5)


@pytest.mark.slow
def test_a_run_with_v_and_cosine_betas(pictures, tmp_path):
    """In the same x_t the squared error of eps is alpha_bar times that of v, which is the loss."""
    run, t, losses, _ = seen_in(pictures, tmp_path / "runs")

    # This is alpha_bar's definition, f(t + 1) / f(0), computed beside the scheduler's. At the
    # last t, whose beta is capped, both are almost 0.
    f = np.cos((np.arange(101) / 100 + 0.008) / 1.008 * np.pi / 2) ** 2
    assert_logged(run, losses, f[t + 1] / f[0] * losses)
    for suffix in ("", "_ema"):
        loss = numbers(run, f"val_loss{suffix}")
        error = numbers(run, f"val_eps_error{suffix}")
        assert loss.keys() == error.keys() == {5, 10}
        assert all(0 < error[step] < loss[step] for step in (5, 10))

    # The grid of the script is that of the training, up to 2 of 255: in memory the two networks
    # are laid out differently.
    out = tmp_path / "sampled"
    call(sample.main, run, "--n", 4, "--sampler", "dpm++", "--steps", 4, "--out", out)
    training = np.asarray(Image.open(run / "samples" / "step-00000010.png"))
    script = np.asarray(Image.open(out / "grid.png"))
    assert abs(training.astype(float) - script).max() <= 2


class InTermsOfEps(torch.nn.Module):
    """Says of x_t what a network of objective x_0 says, as eps."""

    def __init__(self, network, scheduler):
        super().__init__()
        self.network = network
        self.alphas_cumprod = scheduler.alphas_cumprod

    def forward(self, x_t, t):
        a = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        return (x_t - a.sqrt() * self.network(x_t, t)) / (1 - a).sqrt()


@pytest.mark.slow
def test_a_new_objective_is_a_row_of_the_table_and_nothing_else(pictures, tmp_path, monkeypatch):
    """A network of x_0 is trained, sampled from and measured.

    Images and numbers are those of a network of eps that knows the same.
    """
    monkeypatch.setitem(OBJECTIVES, "x_0", X_0)
    flags = ["--diffusion.objective", "x_0", "--diffusion.beta-schedule", "linear"]
    run, t, losses, x_0 = seen_in(pictures, tmp_path / "runs", *flags)

    # A fresh network says 0, so its squared errors are the squares of x_0.
    assert losses[0].mean() == pytest.approx(np.square(x_0[0]).mean(), rel=1e-5)
    a = NoiseScheduler(100).alphas_cumprod.numpy()[t]
    assert_logged(run, losses, a / (1 - a) * losses)

    rebuild = loading.rebuild

    def rebuild_as_eps(*args, **kwargs):
        denoiser = rebuild(*args, **kwargs)
        network = InTermsOfEps(denoiser.network, denoiser.scheduler)
        return replace(denoiser, network=network, objective="eps")

    results = []
    for build in (rebuild, rebuild_as_eps):
        monkeypatch.setattr(loading, "rebuild", build)
        out = tmp_path / build.__name__
        call(sample.main, run, "--n", 4, "--out", out)
        call(evaluate.main, run, "--t-stride", 20, "--out", out)
        [bound] = out.glob("*-bpd-*.json")
        bits = json.loads(bound.read_text())["bits_per_dim"]
        results.append((np.asarray(Image.open(out / "grid.png")).astype(float), bits))
    (pixels, bits), (pixels_of_eps, bits_of_eps) = results
    assert abs(pixels - pixels_of_eps).max() <= 1
    assert bits == pytest.approx(bits_of_eps, rel=1e-5)
