"""The details of an image beside Pillow, and with noise."""

import pytest
import torch
from torch.testing import assert_close

from config import EXPERIMENTS
from functions.noise_scheduler import NoiseScheduler, broadcast
from functions.super_resolution.details import LOG_SNR_SHIFT, STD, details, shrink, stretch
from tests.conftest import normal, shrunk

COSINE = NoiseScheduler(1000, beta_schedule="cosine")
T = torch.tensor([0, 60, 200, 500, 700])
X_0, NOISE = 0.3 * normal(0, 5, 3, 16, 16), normal(1, 5, 3, 16, 16)


def test_an_image_is_what_its_half_says_and_its_details():
    """The truth is Pillow's Lanczos. Sides need not be equal."""
    assert_close(shrink(X_0), shrunk(X_0), atol=1e-5, rtol=0)
    wide = X_0[..., :10, :]
    assert_close(stretch(shrink(wide)) + details(wide), wide)
    assert_close(shrink(details(wide)), torch.zeros(5, 3, 5, 8), atol=1e-5, rtol=0)
    assert_close(shrink(stretch(NOISE)), NOISE, atol=1e-4, rtol=0)
    # Of all images that shrink so, it is the one of least norm.
    assert (stretch(shrink(X_0)) * details(X_0)).sum().abs() < 1e-3


def test_details_of_noisy_images_are_noisy_details_of_a_shifted_schedule():
    """Each t divides them by a factor q, which gives details of photos unit variance."""
    shift = EXPERIMENTS["ffhq-details"].diffusion.log_snr_shift
    assert shift == pytest.approx(LOG_SNR_SHIFT, abs=1e-4)
    scheduler = NoiseScheduler(1000, beta_schedule="cosine", log_snr_shift=shift)
    x_t = scheduler.q_sample(details(X_0) / STD, T, details(NOISE))
    alpha_bar = COSINE.alpha_bar(T)
    q = (alpha_bar * STD**2 + 1 - alpha_bar).sqrt()
    noisy = details(COSINE.q_sample(X_0, T, NOISE))
    assert_close(broadcast(q, x_t) * x_t, noisy, atol=1e-4, rtol=1e-4)
    white, noise = normal(2, 2, 5, 64, 3, 16, 16)
    unit = details(COSINE.q_sample(STD * white, T, noise)) / broadcast(q, white)
    # D leaves three quarters of the variance.
    assert_close(unit.square().mean((1, 2, 3, 4)), torch.full((5,), 0.75), atol=0.02, rtol=0)
