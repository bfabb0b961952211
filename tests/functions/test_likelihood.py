"""The terms of the variational bound.

The truths are the KL divergences of torch.distributions, the standard library's normal CDF, and the
scaled complementary error function for the far tails.
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

SCHEDULER = NoiseScheduler(1000)
LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1


@pytest.mark.parametrize("variance", VARIANCES)
def test_kl_is_that_of_torch_distributions(variance):
    """The truth builds both distributions as objects of PyTorch and asks for their divergence."""
    x_0, predicted, x_t = normal(0, 3, 4, 3, 4, 4, dtype=torch.float64)
    t = torch.tensor([1, 2, 500, 999])
    sigma_squared = model_variance(SCHEDULER, t, variance)

    # L_t is KL(q || p), where q is the true posterior and p the model's.
    found = posterior_kl(SCHEDULER, x_0, predicted, t, sigma_squared)
    mean_q, variance_q = SCHEDULER.q_posterior(x_0, x_t, t, t - 1)
    mean_p, _ = SCHEDULER.q_posterior(predicted, x_t, t, t - 1)
    q = Normal(mean_q, variance_q.sqrt())
    p = Normal(mean_p, sigma_squared.sqrt())
    assert_close(found, kl_divergence(q, p), rtol=1e-9, atol=1e-12)

    # L_T is KL(q || p), where q is q(x_T | x_0) and p pure noise.
    a = SCHEDULER.alphas_cumprod[-1]
    q = Normal(a.sqrt() * x_0, (1 - a).sqrt())
    p = Normal(torch.zeros(()).double(), 1.0)
    assert_close(prior_kl(SCHEDULER, x_0), kl_divergence(q, p), rtol=1e-7, atol=1e-12)

    # At t = 0 q has no variance, and p that of q at t = 1, as in `p_mean_variance` of Ho's code.
    found = model_variance(SCHEDULER, torch.tensor([0]), variance)
    assert found == SCHEDULER.posterior_variance(1, 0)


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
    # In the tails this difference rounds to 0, and its logarithm would be infinite.
    assert torch.isfinite(log_p).all()


@pytest.mark.parametrize("end", [-1.0, 1.0])
def test_far_tails_keep_their_digits(end):
    """200 sigma from the mean, Phi(-z) is below 1e-300. It is exp(-z^2 / 2) erfcx(z / sqrt 2) / 2.

    The mean is at the other end of the levels.
    """
    sigma = 0.0074
    found = decoder_log_likelihood(torch.tensor([end]).double(), -end, sigma)
    z = torch.tensor(2 - 1 / 255, dtype=torch.float64) / sigma
    expected = (torch.special.erfcx(z / math.sqrt(2)) / 2).log() - z**2 / 2
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)


def test_clipping_is_of_the_prediction():
    """The truth is x_0 = 1, which clipping restores.

    The model says eps = -1 where there is no noise. This puts the predicted x_0 above 1.
    """
    x_0 = torch.ones(1, 3, 2, 2)
    wrong = Denoiser(lambda x_t, t: -x_0, SCHEDULER)
    clipped, unclipped = (
        bound_terms(wrong, x_0, torch.tensor([500]), 0 * x_0, "small", clip)[1]
        for clip in (True, False)
    )
    assert clipped == 0 < unclipped
