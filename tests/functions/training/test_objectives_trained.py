"""Trainings with objective v and cosine betas, and with an objective that a test registers."""

from itertools import pairwise

import numpy as np
import pytest
import torch

import sample
import train
from data.augmentation import augment
from data.batches import epoch_order
from data.datasets import load_images
from data.pixels import to_model_range
from functions.denoiser import OBJECTIVES
from functions.noise_scheduler import NoiseScheduler
from functions.training.draws import training_draws
from functions.training.metrics import read_metrics
from tests.conftest import CPU, TRAINED, call, pixels_of, train_tiny
from tests.functions.test_denoiser import X_0


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


def assert_samples_are_the_grid(run, sampler, out):
    """Compare the grid of sample.py with that of the training, up to 2 of 255.

    In memory the two networks are laid out differently.
    """
    call(sample, run, "--n 4 --steps 4 --sampler", sampler, "--out", out)
    training = pixels_of(run / "samples" / "step-00000010.png")
    script = pixels_of(out / "grid.png")
    assert abs(training.astype(float) - script).max() <= 2


@pytest.mark.slow
def test_a_run_with_v_and_shifted_cosine_betas(pictures, tmp_path, capsys):
    """In the same x_t the squared error of eps is alpha_bar times that of v, which is the loss."""
    run, t, losses, x_0 = seen_in(pictures, tmp_path / "runs", "--diffusion.log-snr-shift -1.5")
    assert "cosine betas, log-SNR shifted by -1.5" in capsys.readouterr().out
    images = load_images(pictures, 16).images[TRAINED][epoch_order(46, 0, 0)[:8]]
    flip = training_draws(0, 0, 8, (3, 16, 16), 100, CPU).flip
    assert np.array_equal(x_0[0], augment(to_model_range(torch.tensor(images)), flip).flatten())

    # This is alpha_bar's definition without a shift, f(t + 1) / f(0), computed beside the
    # scheduler's. At the last t, whose beta is capped, both are almost 0.
    f = np.cos((np.arange(101) / 100 + 0.008) / 1.008 * np.pi / 2) ** 2
    a = f[t + 1] / f[0]
    assert_logged(run, losses, a / (a + (1 - a) * np.exp(1.5)) * losses)


@pytest.mark.slow
def test_a_new_objective_is_a_row_of_the_table_and_nothing_else(pictures, tmp_path, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "x_0", X_0)
    flags = "--diffusion.objective x_0 --diffusion.beta-schedule linear"
    run, t, losses, x_0 = seen_in(pictures, tmp_path / "runs", flags)

    # A fresh network says 0, so its squared errors are the squares of x_0.
    assert losses[0].mean() == pytest.approx(np.square(x_0[0]).mean(), rel=1e-5)
    a = NoiseScheduler(100).alphas_cumprod.numpy()[t]
    assert_logged(run, losses, a / (1 - a) * losses)
    assert_samples_are_the_grid(run, "dpm++", tmp_path / "sampled")
