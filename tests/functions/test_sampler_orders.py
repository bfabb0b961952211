"""Every sampler converges as fast as its order says.

The truths are those of pixels from one normal distribution: the mean and the variance of x_t, and
the paths along which noise becomes data.
"""

import pytest
import torch

from functions.noise_scheduler import NoiseScheduler
from functions.timesteps import sampling_times
from tests.functions.known_denoisers import mean_and_variance, white
from tests.functions.test_samplers import CASES

MEAN = 0.3
STD = 0.4
# So even steps in t are exactly even for the numbers of steps below.
T = 102_400


def marginal(scheduler, t, std=STD):
    """Return the mean and the variance of x_t."""
    a = scheduler.alpha_bar(t)
    return a**0.5 * MEAN, a * std**2 + 1 - a


def error_of(sampler, scheduler, times, **options):
    """Return the error of the standard deviation at the end of a way."""
    start, end = (marginal(scheduler, t) for t in (times[0], times[-1]))
    denoiser = white(STD, scheduler, MEAN)
    mean, variance = mean_and_variance(denoiser, sampler, times, start, **options)
    assert mean == pytest.approx(end[0], rel=1e-9)
    return abs(variance**0.5 - end[1] ** 0.5)


def slopes(errors):
    """Return the order between each number of steps and its double."""
    # It is log2 of how many times smaller the error is.
    return (-torch.tensor(errors).log2().diff()).tolist()


@pytest.mark.parametrize("row, options", CASES)
def test_the_error_falls_with_the_order(row, options):
    """With a method of order p, twice as many steps make the error 2^p times smaller.

    Without fresh noise this is the error of each path: from x_T it leads to a multiple of x_T.
    """
    scheduler = NoiseScheduler(T)
    errors = []
    for steps in (160, 320, 640):
        # Where little noise is left, its log-SNR changes too much in a step.
        times = [t for t in sampling_times(scheduler, steps) if t >= T // 20 - 1]
        errors.append(error_of(row.function, scheduler, times, **options))
    assert slopes(errors) == pytest.approx([row.order] * 2, abs=0.15)
    assert errors[-1] < 10 * 0.02**row.order
