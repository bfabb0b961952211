"""Every sampler converges to the data, as fast as its order says, where the ideal denoiser is known in closed form."""

from itertools import pairwise

import pytest
import torch
from torch import distributions
from torch.testing import assert_close

from functions.noise_scheduler import NoiseScheduler
from functions.samplers import ddim_sample, ddpm_sample, dpm_solver_sample, ipndm_sample
from tests.known_denoisers import (
    Mixture,
    exact_path,
    gaussian_images,
    ideal_model,
    mixture_2d,
    mixture_of_images,
    part_of_the_way,
)

SAMPLERS = {
    "ddpm": (ddpm_sample, {}),
    "ddpm, large variance": (ddpm_sample, {"variance": "large"}),
    "ddim": (ddim_sample, {}),
    "ddim, eta 0.5": (ddim_sample, {"eta": 0.5}),
    "dpm++ 2M": (dpm_solver_sample, {}),
    "dpm++ 2M, SDE": (dpm_solver_sample, {"eta": 1.0}),
    "dpm++ 2M, eta 0.5": (dpm_solver_sample, {"eta": 0.5}),
    "ipndm": (ipndm_sample, {}),
}
DATA = {
    "mixture in 2 dimensions": (mixture_2d, (2,)),
    "mixture of 3x8x8 images": (mixture_of_images, (3, 8, 8)),
    "Gaussian 3x8x8 images": (gaussian_images, (3, 8, 8)),
}


def distance(data, x_0):
    """Kolmogorov-Smirnov: the most that the share of samples below any z differs from what is due, in 8 directions."""
    x_0 = x_0.flatten(1)
    directions = torch.randn(5, x_0.shape[1], generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    if isinstance(data, Mixture):  # where the modes lie apart
        directions = torch.cat([directions, data.means - data.means.roll(1, 0)])
    worst, ranks = 0.0, torch.arange(len(x_0) + 1) / len(x_0)
    for direction in directions / directions.norm(dim=1, keepdim=True):
        z = (x_0 @ direction).sort().values
        due = data.cdf(z, direction)
        worst = max(worst, (due - ranks[:-1]).max().item(), (ranks[1:] - due).max().item())
    return worst


@pytest.mark.parametrize("of", DATA)
@pytest.mark.parametrize("sigma", [0.01, 0.5, 20.0])
def test_the_ideal_denoiser_is_the_score(sigma, of):
    """What the tests below stand on: E[eps | y] = -sigma d log p(y) / dy (Tweedie), here of PyTorch's densities."""
    data = DATA[of][0]()
    y = data.sample(20, torch.Generator().manual_seed(0)) + sigma
    y.requires_grad_()
    if isinstance(data, Mixture):
        spread = (data.stds**2 + sigma**2).sqrt()[:, None].expand_as(data.means)
        parts = distributions.Independent(distributions.Normal(data.means, spread), 1)
        density = distributions.MixtureSameFamily(distributions.Categorical(data.weights), parts)
    else:
        density = distributions.Independent(distributions.Normal(data.mean, (data.std**2 + sigma**2).sqrt()), 1)
    (score,) = torch.autograd.grad(density.log_prob(y).sum(), y)
    assert_close(data.eps(y.detach(), torch.full((20, 1), sigma, dtype=torch.float64)), -sigma * score)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(("of", "spacing"), [
    ("mixture in 2 dimensions", "trailing"),
    ("mixture in 2 dimensions", "logsnr"),
    ("mixture of 3x8x8 images", "logsnr"),
    ("Gaussian 3x8x8 images", "trailing"),
])  # fmt: skip
def test_samples_are_distributed_as_the_data(name, of, spacing):
    sampler, options = SAMPLERS[name]
    make, shape = DATA[of]
    data, scheduler, generator = make(), NoiseScheduler(1000), torch.Generator().manual_seed(0)
    n = 4000 if shape == (2,) else 2000
    normal = lambda: torch.randn(n, *shape, generator=generator, dtype=torch.float64)
    x_T = scheduler.q_sample(data.sample(n, generator).view(n, *shape), torch.full((n,), 999), normal())
    few, many = (
        distance(data, sampler(ideal_model(data, scheduler), scheduler, x_T, steps, spacing=spacing, clip_x_0=False,
                               step_noise=lambda k: normal(), **options))
        for steps in (5, 200)
    )  # fmt: skip
    beyond_chance = 2.2 / n**0.5  # of true samples one direction in 8,000 is further off than this
    assert many < beyond_chance
    assert few > many


T = 102_400  # divisible by the numbers of steps below, so that even steps in t are exactly even
START, STOP = T - 1, T // 20 - 1  # sigma from 152 down to 0.17


def slopes(errors):
    """The order between each number of steps and its double: log2 of how many times smaller the error is."""
    return [torch.log2(before / after).item() for before, after in pairwise(errors)]


@pytest.mark.parametrize("of", ["mixture in 2 dimensions", "Gaussian 3x8x8 images"])
@pytest.mark.parametrize(("sampler", "spacing", "order"), [
    (ddim_sample, "logsnr", 1),
    (ddim_sample, "trailing", 1),
    (dpm_solver_sample, "logsnr", 2),
    (dpm_solver_sample, "trailing", 2),
    (ipndm_sample, "logsnr", 2),
])  # fmt: skip
def test_the_error_falls_with_the_order(sampler, spacing, order, of):
    make, shape = DATA[of]
    data, scheduler = make(), NoiseScheduler(T)
    model = ideal_model(data, scheduler)
    x_T = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = exact_path(data, scheduler, x_T, START, STOP)
    errors = []
    for steps in (128, 256, 512):
        times = part_of_the_way(scheduler, steps, spacing, START, STOP)
        errors.append((sampler(model, scheduler, x_T, steps=times, clip_x_0=False) - exact).abs().max())
    print(f"{sampler.__name__}, {spacing}, {of}: {slopes(errors)}")
    assert slopes(errors) == pytest.approx([order] * 2, abs=0.25)
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
    on_step = lambda k, t, x, x_0: states.append(x)
    ipndm_sample(model, scheduler, x_T, steps=times, clip_x_0=False, on_step=on_step)
    y = torch.stack([x_T, *states]) / scheduler.alphas_cumprod[times].sqrt()[:, None, None]
    exact = (sigma[times[1:]] ** (degree + 1) - sigma[times[:-1]] ** (degree + 1)) / (degree + 1)
    errors = (y.diff(dim=0) - exact[:, None, None]).abs().amax(dim=(1, 2))
    assert errors[degree:].max() < 1e-12
    assert (errors[:degree] > 1e-4).all()
