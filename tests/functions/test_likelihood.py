"""The terms of the variational bound.

The truths are the KL divergences of torch.distributions, the standard library's normal CDF, an
asymptotic series for the far tails, and the formulas of the released codes in NumPy.
"""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from functions.denoiser import Denoiser
from functions.likelihood import (
    bound_terms,
    decoder_log_likelihood,
    model_variance,
    posterior_kl,
    prior_kl,
)
from functions.noise_scheduler import NoiseScheduler
from functions.samplers import VARIANCES
from tests.conftest import normal

LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("t", [1, 2, 500, 999])
def test_kl_is_that_of_torch_distributions(variance, t):
    """The truth builds both distributions as objects of PyTorch and asks for their divergence."""
    scheduler = NoiseScheduler(1000)
    x_0, predicted, x_t = normal(t, 3, 4, 3, 4, 4, dtype=torch.float64)
    times = torch.full((4,), t)
    sigma_squared = model_variance(scheduler, times, variance)

    # L_t is KL(q || p), where q is the true posterior and p the model's.
    found = posterior_kl(scheduler, x_0, predicted, times, sigma_squared)
    mean_q, variance_q = scheduler.q_posterior(x_0, x_t, times, times - 1)
    mean_p, _ = scheduler.q_posterior(predicted, x_t, times, times - 1)
    q = Normal(mean_q, variance_q.sqrt())
    p = Normal(mean_p, sigma_squared.sqrt())
    assert_close(found, kl_divergence(q, p), rtol=1e-9, atol=1e-12)

    # L_T is KL(q || p), where q is q(x_T | x_0) and p pure noise.
    a = scheduler.alphas_cumprod[-1]
    q = Normal(a.sqrt() * x_0, (1 - a).sqrt())
    p = Normal(torch.zeros(()).double(), 1.0)
    assert_close(prior_kl(scheduler, x_0), kl_divergence(q, p), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("sigma", [0.0074, 0.05, 1.0])
@pytest.mark.parametrize("mean", [-1.1, -0.3, 0.0, 0.999])
def test_the_decoder_is_a_distribution_over_256_levels(mean, sigma):
    """Each probability is a difference of the CDF between two borders, and all sum to 1."""
    means = torch.full((256,), mean, dtype=torch.float64)
    log_p = decoder_log_likelihood(LEVELS, means, sigma)

    # The borders lie half-way between the levels. The outermost bins reach to infinity, where the
    # CDF is 0 and 1.
    borders = (LEVELS[:-1] + LEVELS[1:]) / 2
    cdf = [0.0, *map(NormalDist(mean, sigma).cdf, borders.tolist()), 1.0]
    assert_allclose(log_p.exp(), np.diff(cdf), atol=1e-13)

    # In the tails the difference of the CDF rounds to 0, and its logarithm would be infinite.
    assert torch.isfinite(log_p).all()


def test_far_tails_keep_their_digits():
    """Beyond 200 sigma, the truth is the asymptotic series of the normal distribution's tail."""
    log_p = decoder_log_likelihood(LEVELS[:1], torch.tensor([1.0]), 0.0074).item()

    # z is where the first bin ends, in standard deviations from the mean.
    z = (LEVELS[0].item() + 1 / 255 - 1) / 0.0074
    # The tail below z has the probability density(z) / -z, times 1 - 1 / z^2 + ...
    first_order = -z * z / 2 - math.log(-z * math.sqrt(2 * math.pi))
    asymptotic = first_order + math.log1p(-1 / z**2)
    assert log_p == pytest.approx(asymptotic, rel=1e-9)

    # The last level under a mean of -1 is the mirror image of the first under a mean of 1.
    mirrored = decoder_log_likelihood(LEVELS[-1:], torch.tensor([-1.0]), 0.0074).item()
    assert mirrored == pytest.approx(log_p, rel=1e-12)


def test_at_t_0_the_variance_is_the_posterior_s_at_t_1():
    """So it is in `p_mean_variance` of Ho's code, for the large variance, too."""
    beta = np.linspace(1e-4, 0.02, 1000)
    expected = beta[1] * beta[0] / (1 - (1 - beta[0]) * (1 - beta[1]))
    for variance in VARIANCES:
        found = model_variance(NoiseScheduler(1000), torch.tensor([0]), variance)
        assert found.item() == pytest.approx(expected, rel=1e-9)


def test_clipping_is_of_the_prediction():
    """The truth is x_0 = 1, which clipping restores.

    The model says eps = -1 where there is no noise. This puts the predicted x_0 above 1.
    """
    scheduler = NoiseScheduler(100)
    x_0 = torch.full((1, 3, 2, 2), 1.0)
    noise = torch.zeros(1, 3, 2, 2)
    t = torch.tensor([50])

    wrong = Denoiser(lambda x_t, t: torch.full_like(x_t, -1.0), scheduler)
    _, clipped = bound_terms(wrong, x_0, t, noise, "small", True)
    _, unclipped = bound_terms(wrong, x_0, t, noise, "small", False)
    assert clipped == 0
    assert unclipped > 0
