"""A network becomes x_0 and eps."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from functions.denoiser import Denoiser
from functions.noise_scheduler import NoiseScheduler
from tests.conftest import small_unet
from tests.functions.known_denoisers import Exact

SCHEDULER = NoiseScheduler(1000)


def images(seed=0):
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("t", [0, 500, 999, torch.tensor([10, 700])], ids=str)
def test_the_true_eps_gives_the_true_x_0(t):
    """The truth is the image that x_t was made from."""
    x_0 = images(1).double()
    noise = images(2).double()
    x_t = SCHEDULER.q_sample(x_0, t, noise)

    predicted, eps = Exact(lambda x_t, t: noise, SCHEDULER).predict(x_t, t)
    assert_close(predicted, x_0)
    assert eps is noise


@pytest.mark.parametrize("t", [-2, 1000, torch.tensor([1000, 3])], ids=str)
def test_timesteps_that_there_are_not_are_no_others(t):
    """A negative index must not count from the end, as it does in Python."""
    with pytest.raises(IndexError):
        Denoiser(lambda x_t, t: x_t, SCHEDULER).predict(images(), t)


@torch.no_grad()
def test_a_denoiser_gives_float32():
    """The truth is the network itself, called without a `Denoiser`."""
    network = small_unet()
    t = torch.tensor([3, 700])
    expected = network(images(), t)
    assert_close(Denoiser(network, SCHEDULER)(images(), t), expected)

    half = Denoiser(network, SCHEDULER, precision=torch.bfloat16)(images().double(), t)
    assert half.dtype == torch.float32
    assert_close(half, expected, rtol=0.1, atol=0.1)
    # Were the two equal, then autocast would have done nothing.
    assert not torch.equal(half, expected)


@pytest.mark.parametrize("training", [True, False])
def test_evaluating_is_without_dropout_and_for_a_while(training):
    """The network is as it was after the context, even after one that an error ended."""
    denoiser = Denoiser(nn.Dropout(0.5).train(training), SCHEDULER)
    with pytest.raises(KeyError), denoiser.evaluating():
        assert not denoiser.network.training
        raise KeyError
    assert denoiser.network.training == training
