"""The details of an image, and their diffusion, beside Pillow and the algebra of Gaussians."""

import pytest
import torch
from torch.testing import assert_close

from functions.denoiser import OBJECTIVES, Denoiser
from functions.details import STD, details, shrink, stretch
from functions.losses import denoising_loss, eps_errors
from functions.noise_scheduler import NoiseScheduler
from tests.conftest import normal, shrunk

COSINE = NoiseScheduler(1000, beta_schedule="cosine")
T = torch.tensor([0, 60, 200, 500, 700])
X_0, NOISE = 0.3 * normal(0, 5, 3, 16, 16), normal(1, 5, 3, 16, 16)
X_T = COSINE.q_sample(X_0, T, NOISE)


def test_an_image_is_what_its_half_says_and_its_details():
    """The truth is Pillow's Lanczos. Sides need not be equal."""
    assert_close(shrink(X_0), shrunk(X_0), atol=1e-5, rtol=0)
    wide = X_0[..., :10, :]
    assert_close(stretch(shrink(wide)) + details(wide), wide)
    assert_close(shrink(details(wide)), torch.zeros(5, 3, 5, 8), atol=1e-5, rtol=0)
    assert_close(shrink(stretch(NOISE)), NOISE, atol=1e-4, rtol=0)
    # Of all images that shrink so, it is the one of least norm.
    assert (stretch(shrink(X_0)) * details(X_0)).sum().abs() < 1e-3


def test_the_target_gives_the_details_back_whatever_the_small_image_is():
    row = OBJECTIVES["details"]
    other = X_0 + stretch(normal(2, 5, 3, 8, 8))
    target = row.target(COSINE, X_0, T, NOISE)
    assert_close(row.target(COSINE, other, T, NOISE), target, atol=1e-3, rtol=0)
    x_0, eps = row.from_output(COSINE, X_T, T, target)
    assert_close(x_0, details(X_0), atol=1e-3, rtol=0)
    # With the part of the small image they are x_0, which says what the eps is.
    whole = x_0 + stretch(shrink(X_0))
    assert_close(COSINE.predict_eps(X_T, T, whole)[1:], NOISE[1:], atol=2e-2, rtol=0)
    assert_close(COSINE.q_sample(x_0, T, eps), X_T)


def test_input_and_target_have_unit_variance_for_details_of_the_standard_deviation():
    """Of white images of this standard deviation, at each t; D leaves three quarters of it."""
    row = OBJECTIVES["details"]
    for t in (0, 300, 600, 990):
        x_0, noise = STD * normal(3, 64, 3, 16, 16), normal(4, 64, 3, 16, 16)
        x_t = COSINE.q_sample(x_0, t, noise)
        for values in (row.network_input(COSINE, x_t, t), row.target(COSINE, x_0, t, noise)):
            assert values.square().mean().item() == pytest.approx(0.75, rel=0.02)


def test_the_loss_is_the_error_of_v_and_says_that_of_eps():
    """A network that is off by known details d: its loss is d^2, and eps is off as logs say."""
    row = OBJECTIVES["details"]
    d = details(normal(5, 5, 3, 16, 16))
    target = row.target(COSINE, X_0, T, NOISE)
    given = []

    def network(x, t, low):
        given.append((x, low))
        return target + d

    denoiser = Denoiser(network, COSINE, "details").given(low=shrink(X_0))
    losses = denoising_loss(denoiser, X_0, T, NOISE)
    assert_close(losses, d.square().mean((1, 2, 3)))
    [(x, low)] = given
    assert_close(x, row.network_input(COSINE, X_T, T))
    assert torch.equal(low, shrink(X_0))

    part = stretch(shrink(X_0))
    eps, right = (
        COSINE.predict_eps(X_T, T, row.from_output(COSINE, X_T, T, v)[0] + part)
        for v in (target + d, target)
    )
    assert_close(
        eps_errors(denoiser, losses, T),
        (eps - right).square().mean((1, 2, 3)),
        rtol=1e-2,
        atol=1e-5,
    )
