"""Every sampler converges to the data, as fast as its order says, where the ideal denoiser is known in closed form."""

import pytest
import torch
from torch import distributions

from functions.noise_scheduler import NoiseScheduler
from functions.samplers import ddim_sample, ddpm_sample, dpm_solver_sample, ipndm_sample
from tests.functions import known_denoisers
from tests.functions.known_denoisers import (
    IMAGES,
    MIXTURE,
    Gaussian,
    double,
    ideal_model,
    part_of_the_way,
)


@pytest.mark.parametrize("data", [MIXTURE, IMAGES], ids=["mixture", "images"])
@pytest.mark.parametrize("sigma", [0.01, 0.5, 20.0])
def test_the_ideal_denoiser_is_the_score(sigma, data):
    """What the tests below stand on: E[eps | y] = -sigma d log p(y) / dy (Tweedie), here of PyTorch's densities."""
    y = data.sample(20, torch.Generator().manual_seed(0)) + sigma
    y.requires_grad_()
    if data is MIXTURE:
        spread = (data.stds**2 + sigma**2).sqrt()[:, None].expand_as(data.means)
        parts = distributions.Independent(distributions.Normal(data.means, spread), 1)
        density = distributions.MixtureSameFamily(distributions.Categorical(data.weights), parts)
    else:
        density = distributions.Independent(
            distributions.Normal(data.mean, (data.std**2 + sigma**2).sqrt()), 1
        )
    (score,) = torch.autograd.grad(density.log_prob(y).sum(), y)
    torch.testing.assert_close(
        data.eps(y.detach(), torch.full((20, 1), sigma, dtype=torch.float64)), -sigma * score
    )


def distance(x_0):
    """Kolmogorov-Smirnov: the most that the share of samples below any z differs from what is due, in 8 directions."""
    random = torch.randn(5, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    # The last, where the modes lie apart
    directions = torch.cat([random, MIXTURE.means - MIXTURE.means.roll(1, 0)])
    errors, ranks = [], torch.arange(len(x_0) + 1) / len(x_0)
    for direction in directions / directions.norm(dim=1, keepdim=True):
        due = MIXTURE.cdf((x_0 @ direction).sort().values, direction)
        errors += [(due - ranks[:-1]).max(), (ranks[1:] - due).max()]
    return max(errors)


@pytest.mark.slow
@pytest.mark.parametrize("spacing", ["trailing", "logsnr"])
@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        *((ddpm_sample, {"variance": variance}) for variance in ("small", "large")),
        *((ddim_sample, {"eta": eta}) for eta in (0.0, 0.5)),
        *((dpm_solver_sample, {"eta": eta}) for eta in (0.0, 0.5, 1.0)),
        (ipndm_sample, {}),
    ],
)
def test_samples_are_distributed_as_the_data(sampler, options, spacing):
    n, scheduler, generator = 4000, NoiseScheduler(1000), torch.Generator().manual_seed(0)
    normal = lambda k=0: torch.randn(n, 2, generator=generator, dtype=torch.float64)
    model, x_T = (
        ideal_model(MIXTURE, scheduler),
        scheduler.q_sample(MIXTURE.sample(n, generator), 999, normal()),
    )
    options = {**options, "spacing": spacing, "clip_x_0": False, "step_noise": normal}
    few, many = (distance(sampler(model, scheduler, x_T, steps, **options)) for steps in (5, 200))
    assert many < 2.2 / n**0.5  # of true samples one direction in 8,000 is further off than this
    assert few > many


T = 102_400  # divisible by the numbers of steps below, so that even steps in t are exactly even
START, STOP = T - 1, T // 20 - 1  # sigma from 152 down to 0.17


def slopes(errors):
    """The order between each number of steps and its double: log2 of how many times smaller the error is."""
    return (-torch.stack(errors).log2().diff()).tolist()


@pytest.fixture(
    scope="module", params=[(MIXTURE, (2,)), (IMAGES, (3, 8, 8))], ids=["mixture", "images"]
)
def path(request):
    """Data, its schedule, and both ends of the ways on which noise becomes data."""
    (data, shape), scheduler = request.param, NoiseScheduler(T)
    x_T = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return data, scheduler, x_T, known_denoisers.exact_path(data, scheduler, x_T, START, STOP)


@pytest.mark.parametrize(
    ("sampler", "spacing", "order"),
    [
        *((ddim_sample, spacing, 1) for spacing in ("logsnr", "trailing")),
        *((dpm_solver_sample, spacing, 2) for spacing in ("logsnr", "trailing")),
        (ipndm_sample, "logsnr", 2),
    ],
)
def test_the_error_falls_with_the_order(sampler, spacing, order, path):
    (data, scheduler, x_T, exact), errors = path, []
    for steps in (128, 256, 512):
        times = part_of_the_way(scheduler, steps, spacing, START, STOP)
        found = sampler(ideal_model(data, scheduler), scheduler, x_T, times, clip_x_0=False)
        errors.append((found - exact).abs().max())
    assert slopes(errors) == pytest.approx([order] * 2, abs=0.25)
    assert errors[-1] < 10 * 0.02**order


@pytest.mark.parametrize(
    ("sampler", "options", "order"),
    [
        *((ddpm_sample, {"variance": variance}, 1) for variance in ("small", "large")),
        (ddim_sample, {"eta": 0.5}, 1),
        *((dpm_solver_sample, {"eta": eta}, 2) for eta in (0.5, 1.0)),
    ],
)
def test_with_fresh_noise_the_error_of_the_distribution_falls_with_the_order(
    sampler, options, order
):
    """The weak order, without any chance in it: by the mean and the variance of one-dimensional data."""
    data, scheduler, errors = Gaussian(double([0.3]), double([0.4])), NoiseScheduler(T), []
    start, stop = (
        (a**0.5 * 0.3, a * 0.4**2 + 1 - a) for a in map(scheduler.alpha_bar, (START, STOP))
    )
    for steps in (128, 256, 512):
        times = part_of_the_way(scheduler, steps, "trailing", START, STOP)
        mean, variance = known_denoisers.mean_and_variance(
            data, sampler, scheduler, times, start, **options
        )
        assert mean == pytest.approx(stop[0], rel=1e-12)
        errors.append(double(abs(variance - stop[1])))
    assert slopes(errors) == pytest.approx([order] * 2, abs=0.15)
    assert errors[-1] < 10 * 0.02**order


@pytest.mark.parametrize("degree", range(4))
def test_an_ipndm_step_integrates_polynomials_as_far_as_it_looks_back(degree):
    """Step k, on steps even in sigma, is exact for sigma^degree if degree <= k and <= 3: so the last are of order 4."""
    scheduler, states = NoiseScheduler(200), []
    sigma = torch.arange(1, 201, dtype=torch.float64) / 100
    scheduler.alphas_cumprod = 1 / (1 + sigma**2)
    model = lambda x_t, t: (sigma[t] ** degree)[:, None].expand_as(x_t)
    x_T = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    times = list(range(199, 0, -22))
    ipndm_sample(
        model, scheduler, x_T, times, clip_x_0=False, on_step=lambda k, t, x, x_0: states.append(x)
    )
    y = torch.stack([x_T, *states]) / scheduler.alphas_cumprod[times].sqrt()[:, None, None]
    exact = (sigma[times[1:]] ** (degree + 1) - sigma[times[:-1]] ** (degree + 1)) / (degree + 1)
    errors = (y.diff(dim=0) - exact[:, None, None]).abs().amax(dim=(1, 2))
    assert errors[degree:].max() < 1e-12 and (errors[:degree] > 1e-4).all()
