"""example.py computes what the rest of the repository computes, and its command draws pictures."""

import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import example
from functions.denoiser import Denoiser
from functions.losses import denoising_loss
from functions.noise_scheduler import NoiseScheduler
from tests.conftest import ROOT, SMALL_MODEL, normal, small_unet


@pytest.fixture
def scheduler(monkeypatch):
    """Let the page have 25 steps."""
    scheduler = NoiseScheduler(25)
    monkeypatch.setattr(example, "T", 25)
    monkeypatch.setattr(example, "beta", scheduler.betas)
    monkeypatch.setattr(example, "alpha", 1 - scheduler.betas)
    monkeypatch.setattr(example, "alpha_bar", scheduler.alphas_cumprod)
    return scheduler


def test_its_betas_and_its_posterior_are_the_schedulers():
    scheduler = NoiseScheduler(example.T)
    assert_close(example.beta, scheduler.betas)
    assert_close(example.alpha_bar, scheduler.alphas_cumprod)

    states = []

    def network(x_t, t):
        states.append(x_t)
        return x_t * t.cos().view(-1, 1, 1, 1)

    torch.manual_seed(3)
    states.append(example.sample(network, normal(0, 2, 3, 4, 4)))
    # Each step follows from the state before it and the same noise.
    torch.manual_seed(3)
    for t, (x_t, x_s) in zip(reversed(range(example.T)), pairwise(states), strict=True):
        x_0 = scheduler.predict_x_0(x_t, t, x_t * math.cos(t)).clamp(-1, 1)
        mean, variance = scheduler.q_posterior(x_0, x_t, t, t - 1)
        assert_close(x_s, mean + variance**0.5 * torch.randn_like(x_t))


def test_its_loss_is_denoising_loss_and_its_average_that_of_the_definition(scheduler, monkeypatch):
    # The learning rate of the second step, which is the last, is nearly 0.
    monkeypatch.setattr(example, "STEPS", 2)
    monkeypatch.setattr(example, "EMA_DECAY", 0.7)
    # 10 images of noise in [-1, 1].
    images = torch.rand(10, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    model = small_unet()
    before = copy.deepcopy(model)
    torch.manual_seed(4)
    ema_model, [loss, _] = example.train(model, images)
    parameters = (each.parameters() for each in (before, model, ema_model))
    for old, new, average in zip(*parameters, strict=True):
        assert_close(average, 0.49 * old + 0.51 * new, rtol=0, atol=1e-6)
    # The first step changes the weights by far more than this tolerance.
    assert (new - old).abs().max() > 1e-4

    # The same draws in the same order: images, which are mirrored, timesteps, noise.
    torch.manual_seed(4)
    x_0 = images[torch.randint(10, (example.BATCH_SIZE,))]
    mirrored = torch.rand(len(x_0), 1, 1, 1).flatten() < 0.5
    x_0[mirrored] = x_0[mirrored].flip(3)
    t = torch.randint(25, (len(x_0),))
    expected = denoising_loss(Denoiser(before, scheduler), x_0, t, torch.randn_like(x_0)).mean()
    assert loss == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.slow
def test_its_command_learns_and_draws(tmp_path, scheduler, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in (("STEPS", 40), ("NETWORK", SMALL_MODEL)):
        monkeypatch.setattr(example, name, value)
    curves = []
    monkeypatch.setattr(example.plt, "semilogy", curves.append)
    example.main()

    # An untrained network predicts 0, so its loss is the variance of the noise, which is 1.
    [losses] = curves
    assert losses[0] == pytest.approx(1, abs=0.05)
    assert np.mean(losses[-5:]) < 0.8
    # Six images of 16 pixels, three times as large, with gaps of 2 around each, make a side.
    assert Image.open("example.png").size == (6 * 50 + 2, 6 * 50 + 2)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"example.png", "example_loss.png"}
    assert names <= {*(ROOT / ".gitignore").read_text().split()}
