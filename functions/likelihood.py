"""The terms of the variational bound of Ho et al. 2020 (Eq. 5).

Images are in [-1, 1] and have 256 levels. t counts from 0, so it is the paper's t minus 1.

    L_T   KL(q(x_T | x_0) || N(0, I)), which depends only on the schedule and the image.
    L_t   KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), for t = 1 .. T-1.
    L_0   -log p(x_0 | x_1) of the discretised Gaussian decoder (Eq. 13), at t = 0.

The mean of p follows from the model's x_0 (Eq. 7), clipped to [-1, 1] as in Ho's evaluation. The
variance of p is fixed, one of VARIANCES as in sampling. The network computes in its denoiser's
precision, and everything else in float64.
"""

import math

import torch
from torch import Tensor

from functions.denoiser import Predictor
from functions.noise_scheduler import NoiseScheduler
from functions.samplers import VARIANCES

# Half the distance between neighbouring levels: 256 levels span [-1, 1].
HALF_BIN = 1 / 255

# The bin of level -1 extends to -infinity, and the bin of level 1 to infinity. A value below
# -OUTER_BIN or above OUTER_BIN is in one of these two. OUTER_BIN is less than 1, because rounding
# can move a level slightly towards 0.
OUTER_BIN = 0.999


def bound_terms(
    denoiser: Predictor, x_0: Tensor, t: Tensor, noise: Tensor, variance: str, clip_x_0: bool
) -> Tensor:
    """Return L_T and L_t of each image, in bits per dimension: (2, B) float64.

    x_0 (B, C, H, W) is in [-1, 1], t is (B,) int64, noise is standard normal, and `variance` is
    that of p, a key of VARIANCES.
    """
    scheduler = denoiser.scheduler
    x_0 = x_0.double()
    x_t = scheduler.q_sample(x_0, t, noise.double())
    predicted_x_0, _ = denoiser.predict(x_t, t, clip_x_0)
    predicted_x_0 = predicted_x_0.double()

    sigma_squared = model_variance(scheduler, t, variance)
    terms = posterior_kl(scheduler, x_0, predicted_x_0, t, sigma_squared)
    # The mean of p(x_0 | x_1) is the predicted x_0 itself (Eq. 7).
    is_L_0 = t == 0
    sigma = sigma_squared[is_L_0].sqrt()
    terms[is_L_0] = -decoder_log_likelihood(x_0[is_L_0], predicted_x_0[is_L_0], sigma)

    bits = torch.stack([prior_kl(scheduler, x_0), terms]) / math.log(2)
    return bits.flatten(2).mean(dim=2)


def model_variance(scheduler: NoiseScheduler, t: Tensor, variance: str) -> Tensor:
    """Return the variance of p(x_{t-1} | x_t), as `p_mean_variance` of Ho's code: (B, 1, 1, 1)."""
    # At t = 0 the posterior's variance is 0, so all choices use its variance at t = 1 instead.
    sigma_squared = VARIANCES[variance](scheduler, t, t - 1)
    at_t_1 = scheduler.posterior_variance(1, 0)
    return torch.where(t == 0, at_t_1, sigma_squared).view(-1, 1, 1, 1)


def prior_kl(scheduler: NoiseScheduler, x_0: Tensor) -> Tensor:
    """Return L_T, KL(N(sqrt(a) x_0, 1 - a) || N(0, 1)), of each dimension in nats: (B, C, H, W)."""
    a = scheduler.alpha_bar(scheduler.timesteps - 1)
    return (a * x_0.square() - a - math.log1p(-a)) / 2


def posterior_kl(
    scheduler: NoiseScheduler, x_0: Tensor, predicted_x_0: Tensor, t: Tensor, sigma_squared: Tensor
) -> Tensor:
    """Return L_t of each dimension, in nats, for t >= 1: (B, C, H, W).

    It is the KL divergence of two normals, with mu tilde (Eq. 7) of x_0 and of the predicted x_0.
    """
    # mu tilde is linear in (x_0, x_t), so the difference of the means is mu tilde of
    # (x_0 - predicted_x_0, 0). Subtracting the means instead would lose digits, since they are
    # nearly equal at small t.
    x_0_error = x_0 - predicted_x_0
    difference, q_variance = scheduler.q_posterior(x_0_error, torch.zeros_like(x_0), t, t - 1)
    ratio = sigma_squared / q_variance
    return (ratio.log() + 1 / ratio - 1 + difference.square() / sigma_squared) / 2


def decoder_log_likelihood(x_0: Tensor, mean: Tensor, sigma: float | Tensor) -> Tensor:
    """Return the log-probability, in nats, of each value's bin under N(mean, sigma^2) (Eq. 13)."""
    lower = (x_0 - HALF_BIN - mean) / sigma
    upper = (x_0 + HALF_BIN - mean) / sigma
    lower = torch.where(x_0 < -OUTER_BIN, -math.inf, lower)
    upper = torch.where(x_0 > OUTER_BIN, math.inf, upper)

    # log Phi is precise only in the left tail. The normal is symmetric, so a bin in the right tail
    # is replaced by its mirror image.
    left = torch.minimum(lower, -upper)
    right = torch.minimum(upper, -lower)

    # This form of log(Phi(right) - Phi(left)) stays precise in the far tails, where Ho's code
    # returns log(1e-12).
    log_left = torch.special.log_ndtr(left)
    log_right = torch.special.log_ndtr(right)
    return log_right + torch.log(-torch.expm1(log_left - log_right))
