"""The seam between a network and the mathematics."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from functions.noise_scheduler import NoiseScheduler
from functions.prediction import Denoiser, predict
from tests.conftest import small_unet

SCHEDULER = NoiseScheduler(1000)


def images(seed=0):
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("t", [0, 500, 999, torch.tensor([10, 700])], ids=str)
def test_the_true_eps_gives_the_true_x_0(t):
    x_0, noise = images(1).double(), images(2).double()
    found, eps = predict(lambda x, t: noise, SCHEDULER, SCHEDULER.q_sample(x_0, t, noise), t)
    assert_close(found, x_0)
    assert eps is noise


@pytest.mark.parametrize("t", [-2, 1000, torch.tensor([1000, 3])], ids=str)
def test_timesteps_that_there_are_not_are_no_others(t):
    with pytest.raises(IndexError):
        predict(lambda x, t: x, SCHEDULER, images(), t)


def test_a_denoiser_gives_float32():
    model, t = small_unet(), torch.tensor([3, 700])
    with torch.no_grad():
        assert_close(Denoiser(model, SCHEDULER)(images(), t), model(images(), t))
        half = Denoiser(model, SCHEDULER, precision=torch.bfloat16)(images().double(), t)
        assert half.dtype == torch.float32
        assert_close(half, model(images(), t), rtol=0.1, atol=0.1)
        assert not torch.equal(half, model(images(), t))  # autocast did something


@pytest.mark.parametrize("training", [True, False])
def test_evaluating_is_without_dropout_and_for_a_while(training):
    denoiser = Denoiser(nn.Dropout(0.5).train(training), SCHEDULER)
    with pytest.raises(KeyError), denoiser.evaluating():
        assert not denoiser.network.training
        raise KeyError
    assert denoiser.network.training == training
