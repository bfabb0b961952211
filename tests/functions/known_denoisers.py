"""Data whose ideal denoiser, and for a Gaussian also whose every path from noise to data, is known in closed form.

All in y = x_t / sqrt(alpha_bar) = x_0 + sigma eps with sigma = sqrt((1 - alpha_bar) / alpha_bar), where noise is only
added; `eps(y (B, D), sigma (B, 1)) -> (B, D)` is the best guess of the noise in y, E[eps | y].
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from functions.timesteps import logsnr_timesteps


@dataclass
class Mixture:
    """K round Gaussians in D dimensions."""

    weights: Tensor  # (K,)
    means: Tensor  # (K, D)
    stds: Tensor  # (K,)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[k] + self.stds[k, None] * noise

    def eps(self, y: Tensor, sigma: Tensor) -> Tensor:
        """Given the component, eps is linear in y; the components are weighted by how likely y is in each."""
        variances = self.stds**2 + sigma**2  # (B, K)
        distances = torch.cdist(y, self.means, compute_mode="donot_use_mm_for_euclid_dist") ** 2
        log_densities = -distances / (2 * variances) - y.shape[1] / 2 * variances.log()
        shares = torch.softmax(self.weights.log() + log_densities, dim=1) / variances
        return sigma * (shares.sum(dim=1, keepdim=True) * y - shares @ self.means)

    def cdf(self, z: Tensor, direction: Tensor) -> Tensor:
        """P(x_0 . direction <= z) for a direction (D,) of length 1: a mixture in one dimension."""
        return (
            self.weights * torch.special.ndtr((z[:, None] - self.means @ direction) / self.stds)
        ).sum(dim=1)


@dataclass
class Gaussian:
    """One Gaussian in D dimensions, of another width in each."""

    mean: Tensor  # (D,)
    std: Tensor  # (D,)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return self.mean + self.std * torch.randn(
            n, len(self.mean), generator=generator, dtype=torch.float64
        )

    def eps(self, y: Tensor, sigma: Tensor) -> Tensor:
        return sigma * (y - self.mean) / (self.std**2 + sigma**2)

    def path(self, y: Tensor, sigma: Tensor, sigma_end: Tensor) -> Tensor:
        """Where dy = eps dsigma leads: the distance to the mean keeps its share of the width sqrt(std^2 + sigma^2)."""
        return (
            self.mean
            + (y - self.mean) * ((self.std**2 + sigma_end**2) / (self.std**2 + sigma**2)).sqrt()
        )


def double(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


MIXTURE = Mixture(
    double([0.5, 0.3, 0.2]),
    double([[-0.6, -0.5], [0.7, -0.2], [0.1, 0.6]]),
    double([0.15, 0.2, 0.3]),
)
UNIFORM = torch.rand(2, 192, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
IMAGES = Gaussian(UNIFORM[0] - 0.5, 0.1 + 0.4 * UNIFORM[1])  # 3 x 8 x 8


def sigmas(alpha_bar: Tensor) -> Tensor:
    return ((1 - alpha_bar) / alpha_bar).sqrt()


def ideal_model(data, scheduler):
    """`(x_t, t) -> eps` of data, for x_t of any shape (B, ...)."""

    def model(x_t, t):
        a = scheduler.alphas_cumprod[t].view(-1, 1)
        return data.eps(x_t.flatten(1) / a.sqrt(), sigmas(a)).view(x_t.shape)

    return model


def mean_and_variance(
    data: Gaussian, sampler, scheduler, times, start=(0.0, 1.0), **options
) -> tuple[float, float]:
    """What a sampler makes of a state with the mean and variance `start`, exactly, for data of one dimension."""
    # With the ideal model the state is linear in all noise: the first image has none, each other a single one, of 1
    noises = torch.eye(len(times) + 1, len(times), dtype=torch.float64).roll(1, 0)
    x = start[0] + start[1] ** 0.5 * noises[:, :1]
    noise = lambda k: noises[:, k + 1 : k + 2]
    x = sampler(
        ideal_model(data, scheduler),
        scheduler,
        x,
        times,
        clip_x_0=False,
        step_noise=noise,
        **options,
    )
    return x[0].item(), (x[1:] - x[0]).square().sum().item()


def exact_path(data, scheduler, x: Tensor, start: int, stop: int, steps: int = 1000) -> Tensor:
    """The state at t = stop, from x (B, ...) at t = start: in closed form, or by Runge-Kutta 4 in log(sigma)."""
    a, a_end = scheduler.alphas_cumprod[[start, stop]]
    y = x.flatten(1) / a.sqrt()
    if isinstance(data, Gaussian):
        y = data.path(y, sigmas(a), sigmas(a_end))
    else:
        h = (sigmas(a_end).log() - sigmas(a).log()) / steps
        slope = lambda y, u: u.exp() * data.eps(y, u.exp().expand(len(y), 1))
        for k in range(steps):
            u = sigmas(a).log() + k * h
            k_1 = slope(y, u)
            k_2 = slope(y + h / 2 * k_1, u + h / 2)
            k_3 = slope(y + h / 2 * k_2, u + h / 2)
            k_4 = slope(y + h * k_3, u + h)
            y = y + h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)
    return (a_end.sqrt() * y).view(x.shape)


def part_of_the_way(scheduler, steps, spacing, start, stop):
    """Timesteps of a solver that goes from start down to stop >= 0 only, as `sampling_times` has for the whole way."""
    if spacing == "logsnr":
        return logsnr_timesteps(scheduler, steps + 1, start, stop)
    return [stop + round((start - stop) - k * (start - stop) / steps) for k in range(steps + 1)]
