"""A guide, and where it changes nothing."""

import math

import pytest
import torch
from torch.testing import assert_close

from functions.guidance import Guided
from functions.noise_scheduler import NoiseScheduler
from tests.functions.known_denoisers import exact, white
from tests.functions.test_samplers import DENOISER, SCHEDULER, X_T


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_guided_x_0_is_on_the_line_through_both(schedule):
    """The model is ideal for N(0.3, 0.4^2). The x_0 of the guide, whose v is 0, is in closed form.

    It is asked only at a log-SNR from -7 to 6. Each network has its own objective.
    """
    scheduler = NoiseScheduler(100, beta_schedule=schedule)
    asked = []

    def zero(x_t, t):
        asked.append(t[0].item())
        return torch.zeros_like(x_t)

    guided = Guided(white(0.4, scheduler, mean=0.3), exact(zero, scheduler, "v"), weight=3.0)
    inside = []
    for t, a in enumerate(scheduler.alphas_cumprod.tolist()):
        gain = a**0.5 * 0.4**2 / (a * 0.4**2 + 1 - a)
        expected = 0.3 + gain * (X_T - a**0.5 * 0.3)
        if -7 <= math.log(a / (1 - a)) <= 6:
            inside += [t, t]
            expected = 3 * expected - 2 * a**0.5 * X_T

        for clip in (False, True):
            if clip:
                expected = expected.clamp(-1, 1)
            x_0, eps = guided.predict(X_T, t, clip)
            assert_close(x_0, expected)
            assert_close(a**0.5 * x_0 + (1 - a) ** 0.5 * eps, X_T)

    assert asked == inside
    assert 70 < len(inside) / 2 < 97


def test_what_changes_nothing_changes_no_bit():
    """A weight of 1 and a guide that is the model do nothing."""
    other = white(0.4, SCHEDULER)
    expected = DENOISER.predict(X_T, 50)
    assert not torch.equal(Guided(DENOISER, other, 2.0).predict(X_T, 50)[0], expected[0])
    for guided in (Guided(DENOISER, other, 1.0), Guided(DENOISER, DENOISER, 2.0)):
        for found, truth in zip(guided.predict(X_T, 50), expected, strict=True):
            assert torch.equal(found, truth)
