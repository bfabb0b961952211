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
from functions.noise_scheduler import NoiseScheduler
from tests.conftest import LittleMemory, normal
from tests.functions.known_denoisers import Gaussian, double, ideal

# The Gaussian data have this mean and this standard deviation in each pixel.
MU = 0.2
S = 0.3


def gaussian_images(count, size):
    """Draw images (count, 3, size, size) float32."""
    return MU + S * normal(0, count, 3, size, size)


def best_denoiser(scheduler, most=64**2):
    """Return the ideal denoiser of pixels from N(MU, S^2), with memory for `most` images."""
    network = ideal(Gaussian(double(MU), double(S)), scheduler).network
    return Denoiser(LittleMemory(network, most), scheduler)


def measure(denoiser, x_0, indices=None, **options):
    """Measure all images x_0, or those with these indices."""
    indices = np.arange(len(x_0)) if indices is None else indices
    options = {"t_stride": 1, "batch_size": 64, "variance": "small", "clip_x_0": True, **options}
    options = BoundOptions(**options)
    return measure_bits_per_dim(denoiser, lambda i: (x_0[[i]], {}), indices, options)


def expected_terms(scheduler, variance):
    """Return L_t (T,) in bits/dim for the ideal denoiser of Gaussian data; t = 0 is no number.

    Each is the KL divergence of two normals with other variances, in NumPy.
    """
    beta = scheduler.betas.numpy()
    a = np.cumprod(1 - beta)
    before = np.append(1.0, a[:-1])
    v_q = beta * (1 - before) / (1 - a)
    v_p = v_q if variance == "small" else beta
    # The ideal denoiser's error is the variance of x_0 given x_t. The squared difference of the
    # means is this error, times the square of the factor that x_0 has in the mean (Eq. 7).
    error = S**2 * (1 - a) / (a * S**2 + 1 - a)
    mean_gap = (np.sqrt(before) * beta / (1 - a)) ** 2 * error
    # At t = 0 the posterior's variance is 0, and NumPy would warn of it.
    with np.errstate(divide="ignore", invalid="ignore"):
        nats = 0.5 * (np.log(v_p / v_q) + v_q / v_p - 1 + mean_gap / v_p)
    return nats / math.log(2)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_terms_equal_the_closed_form_on_gaussian_data(variance):
    scheduler = NoiseScheduler(40)
    x_0 = gaussian_images(64, 8)
    result = measure(best_denoiser(scheduler), x_0, variance=variance, clip_x_0=False)

    # The terms are means of squared normals. Five standard errors of such a mean are allowed.
    rtol = x_0.numel() ** -0.5 * 5 * math.sqrt(2)
    terms = result.terms.mean(axis=0)
    assert_allclose(terms[1:], expected_terms(scheduler, variance)[1:], rtol=rtol)


def test_no_code_is_shorter_than_the_entropy():
    """The pixels are independent, so their entropy is known, and so is the ideal denoiser.

    Its bound is above the entropy, by a gap, because each step of the model is a normal.
    """
    scheduler = NoiseScheduler(1000)
    # Four single levels are a distribution that normals describe badly.
    levels = double([0, 100, 101, 255]) / 127.5 - 1
    p = double([0.4, 0.1, 0.2, 0.3])

    def eps(x_t, t):
        """Weigh the levels by Bayes' rule; their mean is the ideal x_0, and eps follows."""
        a = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
        squares = (x_t[..., None] - a.sqrt()[..., None] * levels).square()
        log_posterior = p.log() - squares / (2 * (1 - a[..., None]))
        x_0 = (log_posterior.softmax(-1) * levels).sum(-1)
        return (x_t - a.sqrt() * x_0) / (1 - a).sqrt()

    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(p, 16 * 48, replacement=True, generator=generator)
    x_0 = levels[drawn].view(16, 3, 4, 4).float()
    result = measure(Denoiser(LittleMemory(eps, 64), scheduler), x_0, t_stride=20)

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
    scheduler = NoiseScheduler(100)
    x_0 = gaussian_images(100, 4)
    denoiser = best_denoiser(scheduler)
    full = measure(denoiser, x_0, clip_x_0=False, batch_size=2048)
    assert full.lengths.tolist() == [1] * 100

    strided = measure(denoiser, x_0, clip_x_0=False, t_stride=10)
    assert strided.lengths.sum() == 100
    assert strided.lengths[0] == 1
    assert strided.lengths.max() == 10

    # The stated error includes the choice of t.
    exact, least_error, *_ = full.numbers().values()
    bound, error, *_ = strided.numbers().values()
    assert least_error < error
    assert abs(bound - exact) < 4 * error


HELD_OUT = np.arange(2, 10)


def small_measurement(indices=HELD_OUT, batch_size=8):
    """Measure some of ten images, by a network that has memory for `most` of them."""
    scheduler = NoiseScheduler(40)
    x_0 = normal(0, 10, 3, 4, 4).clamp(-1, 1)
    denoiser = best_denoiser(scheduler, batch_size)
    return measure(denoiser, x_0, indices, t_stride=3, batch_size=batch_size)


def test_a_term_depends_on_image_and_t_alone():
    """The truth is one measurement of all images."""
    all_images = small_measurement()
    # Every second image has the same terms without the others between.
    half = small_measurement(evenly_spaced(HELD_OUT, 4))
    assert_allclose(half.terms, all_images.terms[::2], rtol=1e-12)
    # No call has more timesteps than batch_size.
    by_three = small_measurement(batch_size=3)
    assert_allclose(by_three.terms, all_images.terms, rtol=1e-12)
