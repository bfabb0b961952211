"""The terms of the variational bound of Ho et al. 2020 (Eq. 5), for images in [-1, 1] with 256 levels.

    L_T      KL(q(x_T | x_0) || N(0, I)): "prior", what the schedule leaves of the image in x_T; nothing is learned
    L_t      KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t = 1 .. T-1 (code t: the paper's t minus 1)
    L_0      -log p(x_0 | x_1) of the discretised Gaussian decoder (Eq. 13), at code t = 0

p has the mean that the model's x_0 gives (Eq. 7; clipped to the range of images, as in Ho's evaluation) and a fixed
variance, "small" or "large" as in sampling. At t = 0, where the small one would be 0, both are the posterior's at
t = 1, as in Ho's code. All but the network is computed in float64.
"""

import math

import torch
from torch import Tensor

from functions.noise_scheduler import NoiseScheduler
from functions.prediction import Model, interpret

VARIANCES = ("small", "large")
HALF_BIN = 1 / 255  # of the 256 levels in [-1, 1]
OPEN = 0.999  # values beyond are the first and the last level, whose bins reach to infinity


def terms_of(
    model: Model,
    scheduler: NoiseScheduler,
    x_0: Tensor,
    t: Tensor,
    noise: Tensor,
    variance: str,
    clip_x_0: bool,
) -> Tensor:
    """L_T and L_t of each image in bits per dimension, and the squared error of its x_0: (3, B) float64.

    x_0 is (B, C, H, W), on the model's device; t (B,) int64; noise (B, C, H, W) standard normal.
    """
    device = x_0.device
    home = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
    x_0, t, noise = x_0.to(home, torch.float64), t.to(home), noise.to(home, torch.float64)
    x_t = scheduler.q_sample(x_0, t, noise)
    output = model(x_t.to(device, torch.float32), t.to(device)).to(home)
    predicted, _ = interpret(model, scheduler, x_t, t, output)
    if clip_x_0:
        predicted = predicted.clamp(-1, 1)
    sigma_squared = model_variance(scheduler, t, variance)
    terms = posterior_kl(scheduler, x_0, predicted, t, sigma_squared)
    first = t == 0
    if first.any():  # the mean of p(x_0 | x_1) is the predicted x_0 itself (Eq. 7)
        terms[first] = -decoder_log_likelihood(
            x_0[first], predicted[first], sigma_squared[first].sqrt()
        )
    in_bits = prior_kl(scheduler, x_0) / math.log(2), terms / math.log(2)
    return torch.stack(
        [value.flatten(1).mean(dim=1) for value in (*in_bits, (predicted - x_0).square())]
    )


def model_variance(scheduler: NoiseScheduler, t: Tensor, variance: str) -> Tensor:
    """(B, 1, 1, 1): the variance of p(x_{t-1} | x_t), as in `p_mean_variance` of Ho's code."""
    at_least_1 = t.clamp(min=1)
    sigma_squared = scheduler.posterior_variance(at_least_1, at_least_1 - 1)
    if variance == "large":
        sigma_squared = torch.where(t == 0, sigma_squared, scheduler.step_beta(t, t - 1))
    return sigma_squared.view(-1, 1, 1, 1)


def prior_kl(scheduler: NoiseScheduler, x_0: Tensor) -> Tensor:
    """L_T of each dimension, in nats: KL(N(sqrt(a) x_0, 1 - a) || N(0, 1)), a being alpha_bar_T."""
    a = scheduler.alpha_bar(scheduler.timesteps - 1)
    return (a * x_0.square() - a - math.log1p(-a)) / 2


def posterior_kl(
    scheduler: NoiseScheduler, x_0: Tensor, predicted: Tensor, t: Tensor, sigma_squared: Tensor
) -> Tensor:
    """L_t of each dimension, in nats, for t >= 1: the KL of two normals whose means differ in x_0 alone (Eq. 7).

    The mean is linear in (x_0, x_t), so the difference of the two is the mean at (x_0 - predicted, 0). The means
    themselves, which agree in many digits at small t, are never subtracted. Meaningless at t = 0.
    """
    difference, q_variance = scheduler.q_posterior(x_0 - predicted, torch.zeros_like(x_0), t, t - 1)
    ratio = sigma_squared / q_variance
    return (ratio.log() + 1 / ratio - 1 + difference.square() / sigma_squared) / 2


def decoder_log_likelihood(x_0: Tensor, mean: Tensor, sigma: float | Tensor) -> Tensor:
    """log of the probability of each value's bin under N(mean, sigma^2) (Eq. 13), in nats; float64.

    Bins are 1/255 to either side; the first and the last are open, so the 256 probabilities sum to 1. The logarithm is
    exact far out in the tails too, where Ho's code stops at log(1e-12).
    """
    x_0, mean = x_0.double(), mean.double()
    lower, upper = (x_0 - HALF_BIN - mean) / sigma, (x_0 + HALF_BIN - mean) / sigma
    lower = torch.where(x_0 < -OPEN, -math.inf, lower)
    upper = torch.where(x_0 > OPEN, math.inf, upper)
    # Both in the left tail, by symmetry: there log Phi keeps its digits
    mirrored = lower + upper > 0
    lower, upper = torch.where(mirrored, -upper, lower), torch.where(mirrored, -lower, upper)
    log_upper = torch.special.log_ndtr(upper)
    return log_upper + torch.log(-torch.expm1(torch.special.log_ndtr(lower) - log_upper))
