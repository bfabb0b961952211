"""A guide, and where it changes nothing.

The truth is the ideal x_0 of Gaussian images, which is known in closed form.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from functions.guidance import Guided
from functions.noise_scheduler import NoiseScheduler
from tests.conftest import drawing_of, normal, small_unet
from tests.functions.known_denoisers import IMAGES, exact, ideal
from tests.functions.test_samplers import all_samplers


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("w", [0.5, 3.0])
def test_the_guided_x_0_is_on_the_line_through_both(w, schedule):
    """The guide is a network of v that says 0, so that its x_0 is sqrt(alpha_bar) x_t.

    It is asked only at a log-SNR from -7 to 6. Each network has its own objective.
    """
    scheduler = NoiseScheduler(1000, beta_schedule=schedule)
    asked = []

    def zero(x_t, t):
        asked.append(t[0].item())
        return torch.zeros_like(x_t)

    guided = Guided(ideal(IMAGES, scheduler), exact(zero, scheduler, "v"), w)
    x_t = normal(0, 3, 192, dtype=torch.float64)
    inside = []
    for t, a in enumerate(scheduler.alphas_cumprod.tolist()):
        gain = a**0.5 * IMAGES.std**2 / (a * IMAGES.std**2 + 1 - a)
        expected = IMAGES.mean + gain * (x_t - a**0.5 * IMAGES.mean)
        if -7 <= math.log(a / (1 - a)) <= 6:
            inside += [t, t]
            expected = w * expected + (1 - w) * a**0.5 * x_t

        for clip in (False, True):
            if clip:
                expected = expected.clamp(-1, 1)
            x_0, eps = guided.predict(x_t, t, clip)
            assert_close(x_0, expected)
            assert_close(a**0.5 * x_0 + (1 - a) ** 0.5 * eps, x_t)

    assert asked == inside
    assert 700 < len(inside) / 2 < 970


@pytest.mark.parametrize("clip", [True, False])
@all_samplers
def test_what_changes_nothing_changes_no_bit(network, row, clip):
    """A weight of 1 and a guide that is the model do nothing."""
    plain = drawing_of(network, 1000).models.denoiser
    draws = normal(0, 6, 2, 3, 16, 16)

    def sampled(denoiser):
        options = {"clip_x_0": clip, "step_noise": draws.__getitem__, **row.options}
        return row.function(denoiser, draws[-1], 5, **options)

    other = replace(plain, network=small_unet(dim_multiply=(1, 1)))
    expected = sampled(plain)
    assert (sampled(Guided(plain, other, 2.0)) - expected).abs().max() > 0.01
    for denoiser in (Guided(plain, other, 1.0), Guided(plain, plain, 2.0)):
        assert torch.equal(sampled(denoiser), expected)
