"""What a denoiser does with its network; test_objectives.py has x_0 and eps."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from functions.denoiser import Denoiser
from functions.noise_scheduler import NoiseScheduler
from tests.conftest import small_unet

SCHEDULER = NoiseScheduler(1000)
X_T = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("t", [-2, 1000, torch.tensor([1000, 3])], ids=str)
def test_timesteps_that_there_are_not_are_no_others(t):
    """A negative index must not count from the end, as it does in Python."""
    with pytest.raises(IndexError):
        Denoiser(lambda x_t, t: x_t, SCHEDULER).predict(X_T, t)


@torch.no_grad()
def test_a_denoiser_gives_float32():
    """The truth is the network itself, called without a `Denoiser`."""
    network = small_unet()
    t = torch.tensor([3, 700])
    expected = network(X_T, t)
    assert_close(Denoiser(network, SCHEDULER)(X_T, t), expected)

    half = Denoiser(network, SCHEDULER, precision=torch.bfloat16)(X_T.double(), t)
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
