"""Every sampler, and DDIM backwards, converges as fast as its order says.

The truths are data whose ideal denoiser is known in closed form (known_denoisers.py): their
distribution, and the paths along which noise becomes data.
"""

import pytest
import torch

from functions.noise_scheduler import BETA_SCHEDULES, NoiseScheduler
from functions.samplers import SAMPLERS, ddim_invert, ddim_sample
from functions.timesteps import sampling_times
from tests.conftest import normal
from tests.functions.known_denoisers import (
    IMAGES,
    MIXTURE,
    Gaussian,
    double,
    ideal,
    mean_and_variance,
    part_of_the_way,
    sigmas,
)
from tests.functions.test_samplers import CASES, noise_steps


def distance(x_0):
    """Return the Kolmogorov-Smirnov distance of samples (N, 2) from MIXTURE, in 3 directions.

    It is the most by which the share of samples below any z differs from the true CDF there.
    """
    # In these directions the modes lie apart.
    directions = MIXTURE.means - MIXTURE.means.roll(1, 0)

    errors = []
    ranks = torch.arange(len(x_0) + 1) / len(x_0)
    for direction in directions / directions.norm(dim=1, keepdim=True):
        z = (x_0 @ direction).sort().values
        expected = MIXTURE.cdf(z, direction)
        # At each sample the share below jumps, so the CDF is compared with both ends of the jump.
        errors.append((expected - ranks[:-1]).max())
        errors.append((ranks[1:] - expected).max())
    return max(errors)


# The data of one dimension have this mean and this standard deviation.
LINE = Gaussian(double([0.3]), double([0.4]))


def marginal(scheduler, t):
    """Return mean and variance of x_t, of N(sqrt(a) 0.3, a 0.4^2 + 1 - a), for data of LINE."""
    a = scheduler.alpha_bar(t)
    return a**0.5 * 0.3, a * 0.4**2 + 1 - a


@pytest.mark.slow
@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
@pytest.mark.parametrize(
    "sampler, options",
    [
        *((row.function, row.options) for row in SAMPLERS.values()),
        *(
            (row.function, {**row.options, "eta": 0.0})
            for row in SAMPLERS.values()
            if row.options.get("eta")
        ),
    ],
)
def test_from_1_to_all_steps_samples_come_nearer_to_the_data(sampler, options, schedule):
    """The truths are the variance of LINE, without chance, and the CDF of MIXTURE."""
    n = 2000
    scheduler = NoiseScheduler(1000, beta_schedule=schedule)
    generator = torch.Generator().manual_seed(0)

    def noise(k):
        return torch.randn(n, 2, generator=generator, dtype=torch.float64)

    errors = []
    distances = []
    for steps in (1, 2, 3, 5, 10, 20, 50, 250, 1000):
        times = sampling_times(scheduler, steps, options["spacing"])
        start = marginal(scheduler, 999)
        _, variance = mean_and_variance(ideal(LINE, scheduler), sampler, times, start, **options)
        errors.append(abs(variance**0.5 - 0.4))
        # The orders, which are 1 or more, are those of many steps.
        assert errors[-1] < 4 / steps

        samples = sampler(ideal(MIXTURE, scheduler), noise(0), steps, step_noise=noise, **options)
        # Rounding may lead a little beyond the range of images.
        assert samples.abs().max() < 1 + 1e-9
        distances.append(distance(samples))

    # These are the errors of 1, 5, 50 and 1000 steps.
    assert errors[0] > errors[3] > errors[6] > errors[8]
    assert distances[0] > distances[3] > distances[6]
    # Of true samples one direction in 8,000 is further off than this.
    assert distances[8] < 2.2 / n**0.5


# T is divisible by the numbers of steps below, so that even steps in t are exactly even.
T = 102_400
# From START to STOP, sigma falls from 152 to 0.17.
START = T - 1
STOP = T // 20 - 1


def slopes(errors):
    """Return the order between each number of steps and its double."""
    # It is log2 of how many times smaller the error is.
    return (-torch.stack(errors).log2().diff()).tolist()


@pytest.mark.parametrize("spacing", ["logsnr", "trailing"])
@pytest.mark.parametrize(
    "row, options",
    [case for case in CASES if not noise_steps(*case, [60, 40, 20])],
)
def test_the_error_falls_with_the_order(row, options, spacing):
    """With a method of order p, twice as many steps make the error 2^p times smaller.

    The truth is where the exact path of IMAGES ends.
    """
    scheduler = NoiseScheduler(T)
    a, a_end = scheduler.alphas_cumprod[[START, STOP]]
    x_T = normal(0, 8, 192, dtype=torch.float64)
    exact = a_end.sqrt() * IMAGES.path(x_T / a.sqrt(), sigmas(a), sigmas(a_end))
    errors = []
    for steps in (128, 256, 512):
        times = part_of_the_way(scheduler, steps, spacing, START, STOP)
        x = row.function(ideal(IMAGES, scheduler), x_T, times, clip_x_0=False, **options)
        errors.append((x - exact).abs().max())

    assert slopes(errors) == pytest.approx([row.order] * 2, abs=0.25)
    assert errors[-1] < 10 * 0.02**row.order


@pytest.mark.parametrize("row, options", CASES)
def test_the_error_of_the_distribution_falls_with_the_order(row, options):
    """Measure the weak order by the exact mean and variance of LINE."""
    scheduler = NoiseScheduler(T)
    start = marginal(scheduler, START)
    true_mean, true_variance = marginal(scheduler, STOP)

    errors = []
    for steps in (128, 256, 512):
        times = part_of_the_way(scheduler, steps, "trailing", START, STOP)
        denoiser = ideal(LINE, scheduler)
        mean, variance = mean_and_variance(denoiser, row.function, times, start, **options)
        assert mean == pytest.approx(true_mean, rel=1e-12)
        errors.append(double(abs(variance - true_variance)))

    assert slopes(errors) == pytest.approx([row.order] * 2, abs=0.15)
    assert errors[-1] < 10 * 0.02**row.order


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_inversion_and_the_way_back_have_order_1(schedule):
    """The truths are the noise to which the exact path of IMAGES leads, and the image.

    In one direction of the data, of standard deviation d, a step from sigma to sigma + h multiplies
    the distance to the mean by 1 + h f(sigma), where f(sigma) = sigma / (d^2 + sigma^2), and the
    step back by 1 - h f(sigma + h). The product is 1 - h^2 d^2 / (d^2 + sigma^2)^2, up to h^3. If
    all steps have the same h / sigma = L / N, where L is the log of the ratio of all sigmas, these
    errors add up to L / N times the integral of sigma d^2 / (d^2 + sigma^2)^2. From 0 to infinity
    it is 1/2, for any d. So N steps bring an image nearer to the mean by the factor 1 - L / 2N.
    """
    scheduler = NoiseScheduler(T, beta_schedule=schedule)
    denoiser = ideal(IMAGES, scheduler)
    x_0 = IMAGES.mean + IMAGES.std * normal(0, 8, 192, dtype=torch.float64)
    first, last = sigmas(scheduler.alphas_cumprod[[0, -1]])
    noise = IMAGES.path(x_0, double(0.0), last) * scheduler.alphas_cumprod[-1].sqrt()

    errors = []
    for steps in (200, 400, 800):
        times = [*part_of_the_way(scheduler, steps - 1, "logsnr", T - 1, 0), -1]
        x_T = ddim_invert(denoiser, x_0, times)
        again = ddim_sample(denoiser, x_T, times, clip_x_0=False)
        differences = torch.stack([x_T - noise, again - x_0])
        errors.append(differences.square().mean((1, 2)).sqrt())

        lost = 1 - (again - IMAGES.mean) / (x_0 - IMAGES.mean)
        predicted = (last / first).log().expand(x_0.shape) / (2 * steps)
        torch.testing.assert_close(lost, predicted, rtol=10 / steps, atol=0)

    for of_noise_or_image in torch.stack(errors, dim=1):
        assert slopes([*of_noise_or_image]) == pytest.approx([1, 1], abs=0.04)
