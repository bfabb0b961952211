"""bits/dim of held-out images.

The truth is the entropy of data whose distribution is known; tests/functions/test_likelihood.py has
the single terms. Batches and memory must not change the result.
"""

import math

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from functions.denoiser import Denoiser
from functions.evaluation.bits_per_dim import (
    BoundOptions,
    evenly_spaced,
    measure_bits_per_dim,
)
from functions.likelihood import model_variance, posterior_kl
from functions.noise_scheduler import NoiseScheduler
from functions.samplers import VARIANCES
from tests.conftest import LittleMemory, normal
from tests.functions.known_denoisers import white

# The Gaussian data have this mean and this standard deviation in each pixel.
MU = 0.2
S = 0.3
SCHEDULER = NoiseScheduler(100)
BEST = white(S, SCHEDULER, MU)


def gaussian_images(count, size):
    """Draw images (count, 3, size, size) float32."""
    return MU + S * normal(0, count, 3, size, size)


def measure(denoiser, x_0, indices=(), t_stride=1, batch_size=64, variance="small", clip=False):
    """Measure all images x_0, or those with these indices."""
    indices = np.array(indices or range(len(x_0)))
    options = BoundOptions(t_stride, batch_size, variance, clip)
    return measure_bits_per_dim(denoiser, lambda i: (x_0[[i]], {}), indices, options)


@pytest.mark.parametrize("variance", VARIANCES)
def test_terms_equal_the_closed_form_on_gaussian_data(variance):
    """The squared error of the ideal denoiser is the variance of x_0 given x_t."""
    x_0 = gaussian_images(64, 8)
    result = measure(BEST, x_0, variance=variance)

    t = torch.arange(1, 100)
    a = SCHEDULER.alpha_bar(t).view(-1, 1, 1, 1)
    error = (S**2 * (1 - a) / (a * S**2 + 1 - a)).sqrt()
    nats = posterior_kl(SCHEDULER, error, 0 * a, t, model_variance(SCHEDULER, t, variance))
    # The terms are means of squared normals. Five standard errors of such a mean are allowed.
    rtol = x_0.numel() ** -0.5 * 5 * math.sqrt(2)
    assert_allclose(result.terms.mean(axis=0)[1:], nats.flatten() / math.log(2), rtol=rtol)


def test_no_code_is_shorter_than_the_entropy():
    """The pixels are independent, so their entropy is known, and so is the ideal denoiser.

    Its bound is above the entropy, by a gap, because each step of the model is a normal.
    """
    scheduler = NoiseScheduler(1000)
    # Four single levels are a distribution that normals describe badly.
    levels = torch.tensor([0, 100, 101, 255]) / 127.5 - 1
    p = torch.tensor([0.4, 0.1, 0.2, 0.3])

    def eps(x_t, t):
        """Weigh the levels by Bayes' rule; their mean is the ideal x_0, and eps follows."""
        a = scheduler.alpha_bar(t).view(-1, 1, 1, 1, 1)
        squares = (x_t[..., None] - a.sqrt() * levels).square()
        posterior = (p.log() - squares / (2 * (1 - a))).softmax(-1)
        return scheduler.predict_eps(x_t, t, (posterior * levels).sum(-1))

    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(p, 16 * 48, replacement=True, generator=generator)
    x_0 = levels[drawn].view(16, 3, 4, 4)
    result = measure(Denoiser(eps, scheduler), x_0, t_stride=20, clip=True)

    # The entropy of a pixel is in bits, and so is the bound.
    entropy = -(p * p.log2()).sum().item()
    bound, error, *_ = result.numbers().values()
    assert entropy - 3 * error < bound < entropy + 1
    bounds = result.prior + result.terms @ result.lengths
    assert error == pytest.approx(torch.tensor(bounds).std() / 4)


def test_strides_are_unbiased():
    """Over many images the sum of few terms is the full one, within the error that is stated.

    The truth is the bound with all 100 terms of each image.
    """
    x_0 = gaussian_images(100, 4)
    full = measure(BEST, x_0)
    assert full.lengths.tolist() == [1] * 100

    strided = measure(BEST, x_0, t_stride=10)
    lengths = strided.lengths
    assert (lengths[0], lengths.max(), lengths.sum()) == (1, 10, 100)

    # The stated error includes the choice of t.
    exact, least_error, *_ = full.numbers().values()
    bound, error, *_ = strided.numbers().values()
    assert least_error < error
    assert abs(bound - exact) < 4 * error


def test_a_term_depends_on_image_and_t_alone():
    """The truth is one measurement of all images."""
    x_0 = gaussian_images(10, 4)

    def terms(indices, batch_size=8):
        # No call has more timesteps than batch_size.
        denoiser = Denoiser(LittleMemory(BEST.network, batch_size), SCHEDULER)
        return measure(denoiser, x_0, indices, 3, batch_size).terms

    held_out = range(2, 10)
    all_terms = terms(held_out)
    # Every second image has the same terms without the others between.
    half = evenly_spaced(np.array(held_out), 4).tolist()
    assert_allclose(terms(half), all_terms[::2], rtol=1e-12)
    assert_allclose(terms(held_out, batch_size=3), all_terms, rtol=1e-12)
