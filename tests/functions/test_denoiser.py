"""Denoisers: objective v beside eps, and one that a test registers, x_0."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from functions.denoiser import OBJECTIVES, Denoiser, Objective
from functions.losses import denoising_loss
from functions.noise_scheduler import NoiseScheduler
from tests.conftest import normal, small_unet
from tests.functions.known_denoisers import exact

SCHEDULER = NoiseScheduler(1000)
# The timesteps of a batch of five images include both ends.
T = torch.tensor([0, 1, 200, 700, 999])


X_0 = Objective(
    target=lambda scheduler, x_0, t, noise: x_0,
    from_output=lambda scheduler, x_t, t, x_0: (x_0, scheduler.predict_eps(x_t, t, x_0)),
    diffusers="sample",
)


@pytest.fixture(autouse=True)
def third_objective(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "x_0", X_0)


def images(seed):
    """Draw five standard normal images (5, 3, 8, 8) float64."""
    return normal(seed, 5, 3, 8, 8, dtype=torch.float64)


def test_v_keeps_the_digits_of_x_0_that_eps_would_lose():
    """The truth is the x_0 in float64 that x_t at T - 1 was made from.

    x_t and v are given in float32, as to any network. By way of eps, x_0 would be divided by
    sqrt(alpha_bar), which is 5e-5 here.
    """
    scheduler = NoiseScheduler(1000, beta_schedule="cosine")
    truths = images(1), images(2)
    x_0, noise = truths
    v = scheduler.v(x_0, 999, noise).float()
    x_t = scheduler.q_sample(x_0, 999, noise).float()
    predicted = Denoiser(lambda x_t, t: v, scheduler, "v").predict(x_t, 999)
    for found, truth in zip(predicted, truths, strict=True):
        assert found.dtype == torch.float32
        assert (found - truth).norm() < 1e-7 * truth.norm()


@pytest.mark.parametrize("objective", ["eps", "v", "x_0"])
def test_the_loss_is_that_of_the_target_and_the_error_of_eps_is_recorded_beside_it(objective):
    """In the same x_t, an error of x_0 is one of eps times the SNR (Eq. 15); of v, alpha_bar.

    tests/functions/test_sampler_diffusers.py compares the predicted x_0 and eps.
    """
    x_0, noise, output = (images(seed) for seed in (1, 2, 3))
    denoiser = exact(lambda x_t, t: output, SCHEDULER, objective)
    losses = denoising_loss(denoiser, x_0, T, noise)
    target = {"eps": noise, "v": SCHEDULER.v(x_0, T, noise), "x_0": x_0}[objective]
    assert losses.keys() == {"loss", "eps_error"}
    assert_close(losses["loss"], (output - target).square().mean((1, 2, 3)))
    a = SCHEDULER.alphas_cumprod[T]
    factor = {"eps": 1, "v": a, "x_0": a / (1 - a)}[objective]
    assert_close(losses["eps_error"], factor * losses["loss"])


X_T = normal(0, 2, 3, 16, 16)


@torch.no_grad()
def test_denoiser_gives_the_dtype_of_the_state():
    """The truth is the network itself, called without a `Denoiser`."""
    network = small_unet()
    t = torch.tensor([3, 700])
    expected = network(X_T, t)
    assert_close(Denoiser(network, SCHEDULER)(X_T, t), expected)

    half = Denoiser(network, SCHEDULER, precision=torch.bfloat16)(X_T.double(), t)
    assert half.dtype == torch.float64
    half = half.float()
    assert_close(half, expected, rtol=0.1, atol=0.1)
    # Were the two equal, then autocast would have done nothing.
    assert not torch.equal(half, expected)

    exact = network.double()(X_T.double(), t)
    double = Denoiser(network, SCHEDULER, precision=torch.float64)
    assert_close(double(X_T.double(), t), exact)
    assert_close(double(X_T, t), exact.float())


def test_denoiser_converts_inputs_that_are_no_integers():
    def network(x_t, t, label, brightness):
        return x_t * brightness * label

    denoiser = Denoiser(network, SCHEDULER)
    given = denoiser.given(label=torch.tensor(2), brightness=torch.tensor(0.1, dtype=torch.float64))
    assert torch.equal(given(X_T, T), X_T * 0.1 * 2)


def test_evaluating_is_without_dropout_and_for_a_while():
    """The network is as it was after the context, even after one that an error ended."""
    denoiser = Denoiser(nn.Dropout(0.5), SCHEDULER)
    with pytest.raises(KeyError), denoiser.evaluating():
        assert not denoiser.network.training
        raise KeyError
    assert denoiser.network.training
