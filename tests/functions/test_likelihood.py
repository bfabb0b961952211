"""The terms of the bound against torch.distributions, a direct CDF, and the formulas of the released codes."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from functions.likelihood import (
    decoder_log_likelihood,
    model_variance,
    posterior_kl,
    prior_kl,
    terms_of,
)
from functions.noise_scheduler import NoiseScheduler

LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("t", [1, 2, 500, 999])
def test_kl_is_that_of_torch_distributions(variance, t):
    scheduler = NoiseScheduler(1000)
    x_0, predicted, x_t = torch.randn(
        3, 4, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(t)
    )
    times = torch.full((4,), t)
    mean_q, variance_q = scheduler.q_posterior(x_0, x_t, times, times - 1)
    mean_p, _ = scheduler.q_posterior(predicted, x_t, times, times - 1)
    sigma_squared = model_variance(scheduler, times, variance)
    expected = kl_divergence(
        Normal(mean_q, variance_q.sqrt()), Normal(mean_p, sigma_squared.sqrt())
    )
    assert_close(
        posterior_kl(scheduler, x_0, predicted, times, sigma_squared),
        expected,
        rtol=1e-9,
        atol=1e-12,
    )
    a = scheduler.alphas_cumprod[-1]
    expected = kl_divergence(
        Normal(a.sqrt() * x_0, (1 - a).sqrt()), Normal(torch.zeros(()).double(), 1.0)
    )
    assert_close(prior_kl(scheduler, x_0), expected, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("sigma", [0.0074, 0.05, 1.0])
@pytest.mark.parametrize("mean", [-1.1, -0.3, 0.0, 0.999])
def test_the_decoder_is_a_distribution_over_256_levels(mean, sigma):
    log_p = decoder_log_likelihood(LEVELS, torch.full((256,), mean, dtype=torch.float64), sigma)
    between = (LEVELS[:-1] + LEVELS[1:]) / 2
    cdf = [0.0, *map(NormalDist(mean, sigma).cdf, between.tolist()), 1.0]
    np.testing.assert_allclose(log_p.exp(), np.diff(cdf), atol=1e-13)
    assert torch.isfinite(log_p).all()  # in the tails too, where the direct difference is 0


def test_far_tails_keep_their_digits():
    log_p = decoder_log_likelihood(LEVELS[:1], torch.tensor([1.0]), 0.0074).item()
    z = (LEVELS[0].item() + 1 / 255 - 1) / 0.0074
    asymptotic = -z * z / 2 - math.log(-z * math.sqrt(2 * math.pi)) + math.log1p(-1 / z**2)
    assert log_p == pytest.approx(asymptotic, rel=1e-9)
    symmetric = decoder_log_likelihood(LEVELS[-1:], torch.tensor([-1.0]), 0.0074).item()
    assert symmetric == pytest.approx(log_p, rel=1e-12)


def test_variances_are_those_of_the_paper_s_code():
    """`p_mean_variance` clips the posterior's log-variance to that at t = 1, and takes it for the first beta too."""
    beta, scheduler = np.linspace(1e-4, 0.02, 1000), NoiseScheduler(1000)
    a = np.cumprod(1 - beta)
    posterior = beta * (1 - np.append(1.0, a[:-1])) / (1 - a)
    for variance, expected in {"small": posterior, "large": beta}.items():
        found = model_variance(scheduler, torch.arange(1000), variance).flatten().numpy()
        np.testing.assert_allclose(found, [posterior[1], *expected[1:]], rtol=1e-9)


def test_clipping_is_of_the_prediction():
    x_0, noise, t = torch.full((1, 3, 2, 2), 1.0), torch.zeros(1, 3, 2, 2), torch.tensor([50])
    wrong = lambda x_t, t: torch.full_like(x_t, -1.0)  # which puts x_0 above 1
    clipped, free = (
        terms_of(wrong, NoiseScheduler(100), x_0, t, noise, "small", clip) for clip in (True, False)
    )
    assert clipped[2] == 0 and free[2] > 0 and clipped[1] < free[1]
