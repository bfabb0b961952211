"""Every sampler converges to the data, as fast as its order says.

The truths are data whose ideal denoiser is known in closed form (known_denoisers.py): their
distribution, and the paths along which noise becomes data.
"""

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from functions.noise_scheduler import NoiseScheduler
from functions.samplers import SAMPLERS, ddim_sample, ddpm_sample, dpm_solver_sample, ipndm_sample
from tests.functions.known_denoisers import (
    IMAGES,
    MIXTURE,
    Gaussian,
    double,
    exact_path,
    ideal_model,
    mean_and_variance,
    part_of_the_way,
)


@pytest.mark.parametrize("data", [MIXTURE, IMAGES], ids=["mixture", "images"])
@pytest.mark.parametrize("sigma", [0.01, 0.5, 20.0])
def test_the_ideal_denoiser_is_the_score(sigma, data):
    """All tests below stand on this: E[eps | y] = -sigma d log p(y) / dy (Tweedie).

    The truth is the derivative of PyTorch's densities, by autograd.
    """
    y = data.sample(20, torch.Generator().manual_seed(0)) + sigma
    y.requires_grad_()
    if data is MIXTURE:
        widths = (data.stds**2 + sigma**2).sqrt()[:, None].expand_as(data.means)
        components = Independent(Normal(data.means, widths), 1)
        density = MixtureSameFamily(Categorical(data.weights), components)
    else:
        density = Independent(Normal(data.mean, (data.std**2 + sigma**2).sqrt()), 1)
    (score,) = torch.autograd.grad(density.log_prob(y).sum(), y)

    eps = data.eps(y.detach(), torch.full((20, 1), sigma, dtype=torch.float64))
    torch.testing.assert_close(eps, -sigma * score)


def distance(x_0):
    """Return the Kolmogorov-Smirnov distance of samples (N, 2) from MIXTURE, in 8 directions.

    It is the most by which the share of samples below any z differs from the true CDF there.
    """
    generator = torch.Generator().manual_seed(5)
    random = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    # In the last three directions the modes lie apart.
    directions = torch.cat([random, MIXTURE.means - MIXTURE.means.roll(1, 0)])

    errors = []
    ranks = torch.arange(len(x_0) + 1) / len(x_0)
    for direction in directions / directions.norm(dim=1, keepdim=True):
        z = (x_0 @ direction).sort().values
        expected = MIXTURE.cdf(z, direction)
        # At each sample the share below jumps, so the CDF is compared with both ends of the jump.
        errors.append((expected - ranks[:-1]).max())
        errors.append((ranks[1:] - expected).max())
    return max(errors)


@pytest.mark.slow
@pytest.mark.parametrize("spacing", ["trailing", "logsnr"])
@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        *((row.function, {}) for row in SAMPLERS.values()),
        (ddpm_sample, {"variance": "large"}),
        (ddim_sample, {"eta": 0.5}),
        (dpm_solver_sample, {"eta": 0.5}),
        (dpm_solver_sample, {"eta": 1.0}),
    ],
)
def test_samples_are_distributed_as_the_data(sampler, options, spacing):
    """The truth is the mixture's CDF. 200 steps come as close to it as true samples would.

    They come closer than 5 steps do.
    """
    n = 4000
    scheduler = NoiseScheduler(1000)
    generator = torch.Generator().manual_seed(0)

    def step_noise(k):
        return torch.randn(n, 2, generator=generator, dtype=torch.float64)

    model = ideal_model(MIXTURE, scheduler)
    x_0 = MIXTURE.sample(n, generator)
    x_T = scheduler.q_sample(x_0, 999, step_noise(0))

    def distance_after(steps):
        samples = sampler(
            model,
            scheduler,
            x_T,
            steps,
            spacing=spacing,
            clip_x_0=False,
            step_noise=step_noise,
            **options,
        )
        return distance(samples)

    few = distance_after(5)
    many = distance_after(200)
    # Of true samples one direction in 8,000 is further off than this.
    assert many < 2.2 / n**0.5
    assert few > many


# T is divisible by the numbers of steps below, so that even steps in t are exactly even.
T = 102_400
# From START to STOP, sigma falls from 152 to 0.17.
START = T - 1
STOP = T // 20 - 1


def slopes(errors):
    """Return the order between each number of steps and its double."""
    # It is log2 of how many times smaller the error is.
    return (-torch.stack(errors).log2().diff()).tolist()


@pytest.fixture(
    scope="module",
    params=[
        (MIXTURE, (2,)),
        (IMAGES, (3, 8, 8)),
    ],
    ids=["mixture", "images"],
)
def path(request):
    """Return data, their schedule, and both ends of the paths on which noise becomes data."""
    data, shape = request.param
    scheduler = NoiseScheduler(T)
    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(8, *shape, generator=generator, dtype=torch.float64)
    exact = exact_path(data, scheduler, x_T, START, STOP)
    return data, scheduler, x_T, exact


@pytest.mark.parametrize(
    ("sampler", "spacing", "order"),
    [
        (ddim_sample, "logsnr", 1),
        (ddim_sample, "trailing", 1),
        (dpm_solver_sample, "logsnr", 2),
        (dpm_solver_sample, "trailing", 2),
        (ipndm_sample, "logsnr", 2),
    ],
)
def test_the_error_falls_with_the_order(sampler, spacing, order, path):
    """With a method of order p, twice as many steps make the error 2^p times smaller.

    The truth is where the exact path ends.
    """
    data, scheduler, x_T, exact = path
    errors = []
    for steps in (128, 256, 512):
        times = part_of_the_way(scheduler, steps, spacing, START, STOP)
        x = sampler(ideal_model(data, scheduler), scheduler, x_T, times, clip_x_0=False)
        errors.append((x - exact).abs().max())

    assert slopes(errors) == pytest.approx([order] * 2, abs=0.25)
    assert errors[-1] < 10 * 0.02**order


@pytest.mark.parametrize(
    ("sampler", "options", "order"),
    [
        (ddpm_sample, {"variance": "small"}, 1),
        (ddpm_sample, {"variance": "large"}, 1),
        (ddim_sample, {"eta": 0.5}, 1),
        (dpm_solver_sample, {"eta": 0.5}, 2),
        (dpm_solver_sample, {"eta": 1.0}, 2),
    ],
)
def test_with_fresh_noise_the_error_of_the_distribution_falls_with_the_order(
    sampler, options, order
):
    """Measure the weak order by the exact mean and variance of one-dimensional data.

    The truth is that x_t ~ N(sqrt(a) 0.3, a 0.4^2 + 1 - a) for data from N(0.3, 0.4^2).
    """
    data = Gaussian(double([0.3]), double([0.4]))
    scheduler = NoiseScheduler(T)

    def true_mean_and_variance(t):
        a = scheduler.alpha_bar(t)
        return a**0.5 * 0.3, a * 0.4**2 + 1 - a

    start = true_mean_and_variance(START)
    true_mean, true_variance = true_mean_and_variance(STOP)

    errors = []
    for steps in (128, 256, 512):
        times = part_of_the_way(scheduler, steps, "trailing", START, STOP)
        mean, variance = mean_and_variance(data, sampler, scheduler, times, start, **options)
        assert mean == pytest.approx(true_mean, rel=1e-12)
        errors.append(double(abs(variance - true_variance)))

    assert slopes(errors) == pytest.approx([order] * 2, abs=0.15)
    assert errors[-1] < 10 * 0.02**order


@pytest.mark.parametrize("degree", range(4))
def test_an_ipndm_step_integrates_polynomials_as_far_as_it_looks_back(degree):
    """Step k is exact for eps = sigma^degree if degree <= k and degree <= 3.

    The steps are even in sigma. So all steps from the fourth on are of order 4. The truth is the
    integral of sigma^degree.
    """
    scheduler = NoiseScheduler(200)
    sigma = torch.arange(1, 201, dtype=torch.float64) / 100
    scheduler.alphas_cumprod = 1 / (1 + sigma**2)

    def model(x_t, t):
        return (sigma[t] ** degree)[:, None].expand_as(x_t)

    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    times = list(range(199, 0, -22))
    states = [x_T]
    ipndm_sample(
        model,
        scheduler,
        x_T,
        times,
        clip_x_0=False,
        on_step=lambda k, t, x, x_0: states.append(x),
    )

    # The method integrates y = x / sqrt(alpha_bar) over sigma.
    y = torch.stack(states) / scheduler.alphas_cumprod[times].sqrt()[:, None, None]
    ends = sigma[times] ** (degree + 1)
    exact = (ends[1:] - ends[:-1]) / (degree + 1)
    errors = (y.diff(dim=0) - exact[:, None, None]).abs().amax(dim=(1, 2))
    assert errors[degree:].max() < 1e-12
    assert (errors[:degree] > 1e-4).all()
