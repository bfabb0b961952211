"""Data whose ideal denoiser is known in closed form.

For a Gaussian the paths from noise to data are known, too. Everything is in terms of
y = x_t / sqrt(alpha_bar) = x_0 + sigma eps with sigma = sqrt((1 - alpha_bar) / alpha_bar), where
noise is only added. `eps(y (B, D), sigma (B, 1)) -> (B, D)` is the best guess of the noise in y,
E[eps | y]. If it were not, no sampler would converge to the distribution of the data.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from functions.denoiser import Denoiser
from functions.timesteps import nearest_timesteps


@dataclass
class Mixture:
    """K round Gaussians in D dimensions."""

    weights: Tensor  # (K,)
    means: Tensor  # (K, D)
    stds: Tensor  # (K,)

    def eps(self, y: Tensor, sigma: Tensor) -> Tensor:
        variances = self.stds**2 + sigma**2  # (B, K)

        # By Bayes' rule a component counts as much as it is likely to have made y.
        distances = torch.cdist(y, self.means, compute_mode="donot_use_mm_for_euclid_dist") ** 2
        log_densities = -distances / (2 * variances) - y.shape[1] / 2 * variances.log()
        posterior = torch.softmax(self.weights.log() + log_densities, dim=1)

        # Given the component k, E[eps | y, k] = sigma (y - mean_k) / variance_k.
        shares = posterior / variances
        return sigma * (shares.sum(dim=1, keepdim=True) * y - shares @ self.means)

    def cdf(self, z: Tensor, direction: Tensor) -> Tensor:
        """Return P(x_0 . direction <= z) for a direction (D,) of length 1."""
        # Along a direction the data are a mixture in one dimension.
        deviations = (z[:, None] - self.means @ direction) / self.stds
        return (self.weights * torch.special.ndtr(deviations)).sum(dim=1)


@dataclass
class Gaussian:
    """One Gaussian in D dimensions, of another width in each."""

    mean: Tensor  # (D,)
    std: Tensor  # (D,)

    def eps(self, y: Tensor, sigma: Tensor) -> Tensor:
        return sigma * (y - self.mean) / (self.std**2 + sigma**2)

    def path(self, y: Tensor, sigma: Tensor, sigma_end: Tensor) -> Tensor:
        """Return where the ODE dy = eps dsigma leads from y at sigma."""
        # The distance to the mean grows and shrinks with the width of y, sqrt(std^2 + sigma^2).
        growth = ((self.std**2 + sigma_end**2) / (self.std**2 + sigma**2)).sqrt()
        return self.mean + (y - self.mean) * growth


def double(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


MIXTURE = Mixture(
    weights=double([0.5, 0.3, 0.2]),
    means=double([[-0.6, -0.5], [0.7, -0.2], [0.1, 0.6]]),
    stds=double([0.15, 0.2, 0.3]),
)
UNIFORM = torch.rand(2, 192, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
# 192 dimensions are images of 3 x 8 x 8.
IMAGES = Gaussian(UNIFORM[0] - 0.5, 0.1 + 0.4 * UNIFORM[1])


def sigmas(alpha_bar: Tensor) -> Tensor:
    return ((1 - alpha_bar) / alpha_bar).sqrt()


# A denoiser whose truths keep their digits.
exact = partial(Denoiser, precision=torch.float64)


def ideal(data, scheduler) -> Denoiser:
    """Return the ideal denoiser of this data, E[eps | x_t], for x_t of any shape (B, ...)."""

    def network(x_t, t):
        a = scheduler.alphas_cumprod[t].view(-1, 1)
        # y is in proportion to x_t, so the noise in it is the same.
        y = x_t.flatten(1) / a.sqrt()
        return data.eps(y, sigmas(a)).view(x_t.shape)

    return exact(network, scheduler)


def white(std, scheduler) -> Denoiser:
    """Return the ideal denoiser of images whose pixels are independent, from N(0, std^2)."""
    return ideal(Gaussian(double(0.0), double(std)), scheduler)


def mean_and_variance(denoiser, sampler, times, start, **options) -> tuple[float, float]:
    """Return the mean and the variance that a sampler gives to a state of those in `start`.

    The denoiser is the ideal one of a Gaussian in one dimension. There is no chance in it: the two
    are exact.
    """
    # So the result is linear in all standard normal draws, and it is enough to follow one "image"
    # without any draw, which is the mean, and for each draw one "image" in which this draw is 1 and
    # the others are 0.
    noises = torch.eye(len(times) + 1, len(times), dtype=torch.float64).roll(1, 0)

    def step_noise(k):
        # Draw 0 is that of the first state, and draw k + 1 belongs to step k.
        return noises[:, k + 1 : k + 2]

    mean, variance = start
    x = sampler(
        denoiser,
        mean + variance**0.5 * noises[:, :1],
        times,
        clip_x_0=False,
        step_noise=step_noise,
        **options,
    )
    # Independent draws add up in squares.
    return x[0].item(), (x[1:] - x[0]).square().sum().item()


def part_of_the_way(scheduler, steps, spacing, start, stop):
    """Return the timesteps of a solver that goes from `start` down to `stop` >= 0 only.

    `sampling_times` has those for the whole way.
    """
    if spacing == "logsnr":
        ends = torch.logit(scheduler.alphas_cumprod[[start, stop]]).tolist()
        return nearest_timesteps(scheduler, torch.linspace(*ends, steps + 1, dtype=torch.float64))
    distance = start - stop
    return [stop + round(distance - k * distance / steps) for k in range(steps + 1)]
