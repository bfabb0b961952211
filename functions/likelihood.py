"""The terms of the variational bound of Ho et al. 2020 (Eq. 5).

The images are in [-1, 1] and have 256 levels.

    L_T   KL(q(x_T | x_0) || N(0, I)): the "prior" term, what the schedule leaves of the image in
          x_T. Nothing of it is learned.
    L_t   KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t = 1 .. T-1 (the paper's t minus 1).
    L_0   -log p(x_0 | x_1) of the discretised Gaussian decoder (Eq. 13), at t = 0.

p has the mean that the model's x_0 gives (Eq. 7), with x_0 clipped to the range of images, as in
Ho's evaluation. Its variance is fixed, "small" or "large" as in sampling. At t = 0, where the small
one would be 0, both are the posterior's at t = 1, as in Ho's code. All but the network is computed
in float64.
"""

import math

import torch
from torch import Tensor

from functions.noise_scheduler import NoiseScheduler
from functions.prediction import Model, interpret

# The bin of a level reaches this far to either side: there are 256 levels in [-1, 1].
HALF_BIN = 1 / 255

# Values above this are the last level and those below -0.999 the first, whose bins are open.
OPEN = 0.999


def terms_of(
    model: Model,
    scheduler: NoiseScheduler,
    x_0: Tensor,
    t: Tensor,
    noise: Tensor,
    variance: str,
    clip_x_0: bool,
) -> Tensor:
    """Return L_T and L_t of each image in bits per dimension, and the squared error of its x_0.

    x_0 is (B, C, H, W), on the model's device; t is (B,) int64, and the noise (B, C, H, W) standard
    normal. The result is (3, B) float64.
    """
    device = x_0.device
    # MPS has no float64, so there all but the network is computed on the CPU.
    home = "cpu" if device.type == "mps" else device
    x_0 = x_0.to(home, torch.float64)
    t = t.to(home)
    noise = noise.to(home, torch.float64)

    x_t = scheduler.q_sample(x_0, t, noise)
    output = model(x_t.to(device, torch.float32), t.to(device)).to(home)
    predicted, _ = interpret(model, scheduler, x_t, t, output)
    if clip_x_0:
        predicted = predicted.clamp(-1, 1)

    sigma_squared = model_variance(scheduler, t, variance)
    terms = posterior_kl(scheduler, x_0, predicted, t, sigma_squared)
    first = t == 0
    if first.any():
        # The mean of p(x_0 | x_1) is the predicted x_0 itself (Eq. 7).
        sigma = sigma_squared[first].sqrt()
        terms[first] = -decoder_log_likelihood(x_0[first], predicted[first], sigma)

    values = [
        prior_kl(scheduler, x_0) / math.log(2),
        terms / math.log(2),
        (predicted - x_0).square(),
    ]
    return torch.stack([value.flatten(1).mean(dim=1) for value in values])


def model_variance(scheduler: NoiseScheduler, t: Tensor, variance: str) -> Tensor:
    """Return the variance of p(x_{t-1} | x_t), as `p_mean_variance` of Ho's code: (B, 1, 1, 1)."""
    at_least_1 = t.clamp(min=1)
    sigma_squared = scheduler.posterior_variance(at_least_1, at_least_1 - 1)
    if variance == "large":
        sigma_squared = torch.where(t == 0, sigma_squared, scheduler.step_beta(t, t - 1))
    return sigma_squared.view(-1, 1, 1, 1)


def prior_kl(scheduler: NoiseScheduler, x_0: Tensor) -> Tensor:
    """Return L_T of each dimension, in nats.

    It is KL(N(sqrt(a) x_0, 1 - a) || N(0, 1)), where a is alpha_bar_T.
    """
    a = scheduler.alpha_bar(scheduler.timesteps - 1)
    return (a * x_0.square() - a - math.log1p(-a)) / 2


def posterior_kl(
    scheduler: NoiseScheduler, x_0: Tensor, predicted: Tensor, t: Tensor, sigma_squared: Tensor
) -> Tensor:
    """Return L_t of each dimension, in nats, for t >= 1; at t = 0 it has no meaning.

    It is the KL of two normals whose means differ in x_0 alone (Eq. 7).
    """
    # The mean is linear in (x_0, x_t), so the difference of the two is the mean at
    # (x_0 - predicted, 0). The means themselves agree in many digits at small t, and subtracting
    # them would lose these.
    difference, q_variance = scheduler.q_posterior(x_0 - predicted, torch.zeros_like(x_0), t, t - 1)
    ratio = sigma_squared / q_variance
    return (ratio.log() + 1 / ratio - 1 + difference.square() / sigma_squared) / 2


def decoder_log_likelihood(x_0: Tensor, mean: Tensor, sigma: float | Tensor) -> Tensor:
    """Return the log-probability of each value's bin under N(mean, sigma^2) (Eq. 13).

    It is in nats. Bins reach 1/255 to either side. The first and the last are open, so
    the 256 probabilities sum to 1.
    """
    lower = (x_0 - HALF_BIN - mean) / sigma
    upper = (x_0 + HALF_BIN - mean) / sigma
    lower = torch.where(x_0 < -OPEN, -math.inf, lower)
    upper = torch.where(x_0 > OPEN, math.inf, upper)

    # By symmetry every bin has a mirror image of the same probability. The one further left is
    # taken, since log Phi keeps its digits in the left tail.
    left = torch.minimum(lower, -upper)
    right = torch.minimum(upper, -lower)

    # log(Phi(right) - Phi(left)) is exact far out in the tails, too, where Ho's code stops at
    # log(1e-12).
    log_left = torch.special.log_ndtr(left)
    log_right = torch.special.log_ndtr(right)
    return log_right + torch.log(-torch.expm1(log_left - log_right))
