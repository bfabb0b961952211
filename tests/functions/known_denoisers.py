"""Data whose ideal denoiser is known in closed form: pixels from one normal distribution.

If the best guess of the noise, E[eps | x_t], were another one, no sampler would converge to the
distribution of the data.
"""

from functools import partial

import torch

from functions.denoiser import Denoiser
from functions.noise_scheduler import broadcast

# A denoiser whose truths keep their digits.
exact = partial(Denoiser, precision=torch.float64)


def white(std, scheduler, mean=0.0) -> Denoiser:
    """Return the ideal denoiser of images whose pixels are independent, from N(mean, std^2)."""

    def network(x_t, t, low=None):
        a = broadcast(scheduler.alpha_bar(t), x_t.double())
        return (1 - a).sqrt() * (x_t - a.sqrt() * mean) / (a * std**2 + 1 - a)

    return exact(network, scheduler)


def mean_and_variance(denoiser, sampler, times, start, **options) -> tuple[float, float]:
    """Return the mean and the variance that a sampler gives to a state of those in `start`.

    The denoiser is that of `white`. There is no chance in it: the two are exact.
    """
    # The result is linear in all standard normal draws, so it is enough to follow one "image"
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
