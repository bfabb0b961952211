"""A training with an objective that a test registers, and shifted cosine betas."""

from itertools import pairwise

import numpy as np
import pytest
import torch

import sample
import train
from config import EXPERIMENTS
from data.batches import augment, epoch_order
from data.datasets import load_images
from data.pixels import to_model_range
from functions.denoiser import OBJECTIVES
from functions.training.data import training_draws
from functions.training.metrics import read_metrics
from tests.conftest import CPU, TRAINED, call, pixels_of, train_tiny
from tests.functions.test_denoiser import X_0


def assert_samples_are_the_grid(run, sampler, out):
    """Compare the grid of sample.py with that of the training, up to 2 of 255.

    In memory the two networks are laid out differently.
    """
    call(sample, run, "--n 4 --steps 4 --sampler", sampler, "--out", out)
    training = pixels_of(run / "samples" / "step-00000010.png")
    script = pixels_of(out / "grid.png")
    assert abs(training.astype(float) - script).max() <= 2


@pytest.mark.slow
def test_a_new_objective_is_a_row_of_the_table_and_nothing_else(
    pictures, tmp_path, monkeypatch, capsys
):
    """The truths are the images that a step should see, and alpha_bar's definition."""
    monkeypatch.setitem(OBJECTIVES, "x_0", X_0)
    original = train.denoising_loss
    seen = []

    def seeing(denoiser, x_0, t, noise):
        losses = original(denoiser, x_0, t, noise)
        seen.append((t, losses["loss"].detach(), x_0))
        return losses

    monkeypatch.setattr(train, "denoising_loss", seeing)
    flags = "--diffusion.objective x_0 --diffusion.log-snr-shift -1.5"
    run = train_tiny(pictures, tmp_path / "runs", flags, name="faces-v")
    assert "cosine betas, log-SNR shifted by -1.5" in capsys.readouterr().out
    t, losses, x_0 = (torch.stack(parts).numpy() for parts in zip(*seen, strict=True))

    images = load_images(pictures, 16).images[TRAINED][epoch_order(46, 0, 0)[:8]]
    config = EXPERIMENTS["faces-v"].override(batch_size=8, timesteps_diff=100).diffusion
    flip = training_draws(config, 0, (3, 16, 16), CPU).flip
    assert np.array_equal(x_0[0], augment(to_model_range(torch.tensor(images)), flip))
    # A fresh network says 0, so its squared errors are the squares of x_0.
    assert losses[0].mean() == pytest.approx(np.square(x_0[0]).mean(), rel=1e-5)

    # The squared error of eps is that of x_0 times the SNR, which is exp(-1.5) times that without
    # a shift. Here alpha_bar is f(t + 1) / f(0); at the last t, whose beta is capped, almost 0.
    f = np.cos((np.arange(101) / 100 + 0.008) / 1.008 * np.pi / 2) ** 2
    a = f[t + 1] / f[0]
    errors = a / (1 - a) * np.exp(-1.5) * losses
    # A row is written after each of these steps, with the mean since the row before.
    logged = (0, 2, 4, 5, 6, 8, 10)
    rows = read_metrics(run / "metrics.csv")
    for column, values in (("loss", losses), ("eps_error", errors)):
        found = {row["step"]: row[column] for row in rows if row[column] is not None}
        means = {last: values[first:last].mean() for first, last in pairwise(logged)}
        assert found == pytest.approx(means, rel=1e-5)

    assert_samples_are_the_grid(run, "dpm++", tmp_path / "sampled")
