"""Every sampler, and DDIM backwards, converges as fast as its order says.

The truths are those of pixels from one normal distribution: the mean and the variance of x_t, and
the paths along which noise becomes data.
"""

import pytest
import torch

from functions.noise_scheduler import BETA_SCHEDULES, NoiseScheduler
from functions.samplers import ddim_invert, ddim_sample
from functions.timesteps import sampling_times
from tests.conftest import normal
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


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("row, options", CASES)
def test_from_1_to_all_steps_samples_come_nearer_to_the_data(row, options, schedule):
    scheduler = NoiseScheduler(1000, beta_schedule=schedule)
    options = row.options | options
    errors = []
    for steps in (1, 2, 3, 5, 10, 20, 50, 250, 1000):
        times = sampling_times(scheduler, steps, options["spacing"])
        errors.append(error_of(row.function, scheduler, times, **options))
        # The orders, which are 1 or more, are those of many steps.
        assert errors[-1] < 4 / steps
    # These are the errors of 1, 50 and 1000 steps.
    assert errors[0] > errors[6] > errors[8]


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


def test_inversion_and_the_way_back_have_order_1():
    """The truths are the noise to which the exact path leads, and the image.

    For data of standard deviation d, a step from sigma to sigma + h multiplies the distance to the
    mean by 1 + h f(sigma), where f(sigma) = sigma / (d^2 + sigma^2), and the step back by
    1 - h f(sigma + h). The product is 1 - h^2 d^2 / (d^2 + sigma^2)^2, up to h^3. If all steps have
    the same h / sigma = L / N, where L is the log of the ratio of all sigmas, these errors add up
    to L / N times the integral of sigma d^2 / (d^2 + sigma^2)^2. From 0 to infinity it is 1/2. So
    N steps bring an image nearer to the mean by the factor 1 - L / 2N.
    """
    scheduler = NoiseScheduler(T)
    # Of data that vary so little, even the step from the image to t = 0 counts.
    std = 0.05
    denoiser = white(std, scheduler, MEAN)
    z = normal(0, 8, 1, dtype=torch.float64)
    x_0 = MEAN + std * z
    mean, variance = marginal(scheduler, T - 1, std)
    L = (scheduler.log_snr(0) - scheduler.log_snr(T - 1)) / 2

    errors = []
    for steps in (200, 400, 800):
        times = sampling_times(scheduler, steps, "logsnr")
        x_T = ddim_invert(denoiser, x_0, times)
        errors.append((x_T - mean - variance**0.5 * z).norm())

        again = ddim_sample(denoiser, x_T, times, clip_x_0=False)
        nearer = (again - MEAN) / (x_0 - MEAN)
        assert 1 - nearer.numpy() == pytest.approx(L / (2 * steps), rel=10 / steps)
    assert slopes(errors) == pytest.approx([1, 1], abs=0.06)
