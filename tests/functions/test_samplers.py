"""The reverse process: exact recursions, and what all samplers promise."""

import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch

from functions.noise_scheduler import NoiseScheduler
from functions.samplers import ddim_sample, ddpm_sample, dpm_solver_sample, ipndm_sample
from functions.timesteps import sampling_times
from tests.functions.known_denoisers import Gaussian, double, mean_and_variance

SHAPE = (2, 3, 4, 4)
all_samplers = pytest.mark.parametrize(
    "sampler", [ddpm_sample, ddim_sample, dpm_solver_sample, ipndm_sample]
)


def smooth_model(x_t, t):
    """Some nonlinear function of both arguments; what it is does not matter where two samplers are compared."""
    return torch.tanh(0.8 * x_t + 0.3 * torch.sin(t.double() / 90).view(-1, 1, 1, 1))


def noise_source(seed=2):
    generator = torch.Generator().manual_seed(seed)
    return lambda k: torch.randn(SHAPE, generator=generator, dtype=torch.float64)


def pure_noise(seed=1):
    return 1.5 * noise_source(seed)(0)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(
    ("steps", "spacing"), [(100, "trailing"), (17, "trailing"), (10, "logsnr")]
)
def test_ddim_with_eta_1_is_ddpm(steps, spacing, clip):
    scheduler, options = NoiseScheduler(100), {"spacing": spacing, "clip_x_0": clip}
    ddpm = ddpm_sample(
        smooth_model, scheduler, pure_noise(), steps, step_noise=noise_source(), **options
    )
    ddim = ddim_sample(
        smooth_model, scheduler, pure_noise(), steps, 1.0, step_noise=noise_source(), **options
    )
    torch.testing.assert_close(ddim, ddpm, rtol=1e-9, atol=1e-9)


def algorithm_2(a, a_s):
    """The factors of x_t and of eps, and the variance of the noise, in line 4 of Algorithm 2 (Ho et al. 2020)."""
    beta = 1 - a / a_s
    return (
        1 / np.sqrt(1 - beta),
        -beta / np.sqrt(1 - a) / np.sqrt(1 - beta),
        beta * (1 - a_s) / (1 - a),
    )


def eq_12(a, a_s):
    """The same of DDIM with eta = 0 (Song et al. 2021)."""
    return np.sqrt(a_s / a), np.sqrt(1 - a_s) - np.sqrt(a_s / a) * np.sqrt(1 - a), 0.0


@pytest.mark.parametrize(
    ("sampler", "formula", "timesteps", "steps"),
    [
        *((ddpm_sample, algorithm_2, n, n) for n in (50, 200)),
        *((ddim_sample, eq_12, 1000, n) for n in (10, 50)),
    ],
)
def test_the_distribution_is_exactly_that_of_the_paper_s_formula(
    sampler, formula, timesteps, steps
):
    """In one dimension, x_0 ~ N(m, s^2), the best eps is linear in x_t."""
    m, s, scheduler = 0.3, 0.4, NoiseScheduler(timesteps)
    times = sampling_times(scheduler, steps)
    # [-1]: the clean image
    alpha_bar = np.append(np.cumprod(1 - np.linspace(0.1, 20, timesteps) / timesteps), 1.0)
    mean, variance = 0.0, 1.0
    for a, a_s in pairwise(alpha_bar[times]):
        of_x, of_eps, added = formula(a, a_s)
        slope = np.sqrt(1 - a) / (a * s**2 + 1 - a)  # eps = slope (x_t - sqrt(a) m)
        mean = of_x * mean + of_eps * slope * (mean - np.sqrt(a) * m)
        variance = (of_x + of_eps * slope) ** 2 * variance + added
    found = mean_and_variance(Gaussian(double([m]), double([s])), sampler, scheduler, times)
    assert found == pytest.approx((mean, variance), rel=1e-9)


@all_samplers
def test_clipping_is_that_of_a_model_whose_eps_agrees_with_the_clipped_x_0(sampler):
    scheduler, predictions = NoiseScheduler(100), []
    wild = lambda x_t, t: smooth_model(x_t, t) - 2 * x_t
    keep = lambda k, t, x, x_0: predictions.append(x_0)
    clipped_x_0 = lambda x_t, t: scheduler.predict_x_0(x_t, t, wild(x_t, t)).clamp(-1, 1)
    clipped = lambda x_t, t: scheduler.predict_eps(x_t, t, clipped_x_0(x_t, t))
    ours = sampler(wild, scheduler, pure_noise(), 20, step_noise=noise_source(), on_step=keep)
    expected = sampler(
        clipped, scheduler, pure_noise(), 20, clip_x_0=False, step_noise=noise_source()
    )
    torch.testing.assert_close(ours, expected.clamp(-1, 1), rtol=1e-9, atol=1e-9)
    assert torch.stack(predictions).abs().max() == 1 and ours.abs().max() <= 1


def test_noise_is_asked_for_once_a_step_and_not_at_the_end():
    def asked(sampler, *arguments):
        calls = []
        noise = lambda k: calls.append(k) or torch.randn(SHAPE)
        sampler(smooth_model, NoiseScheduler(100), torch.randn(SHAPE), *arguments, step_noise=noise)
        return calls

    assert asked(ddpm_sample) == list(range(99))
    assert asked(ddpm_sample, [60, 40, 20]) == [0, 1]  # 20 is not the end: there noise is left
    assert asked(dpm_solver_sample, 10, 1.0) == list(range(9))
    assert asked(ddim_sample, 10) == asked(dpm_solver_sample, 10) == asked(ipndm_sample, 10) == []


@all_samplers
def test_a_sample_depends_on_its_own_noise_alone(sampler):
    noises = torch.randn(13, 5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    sampled = lambda some: sampler(
        smooth_model, NoiseScheduler(100), some[-1], 12, step_noise=lambda k: some[k]
    )
    together = sampled(noises)
    for i in range(5):
        assert torch.equal(sampled(noises[:, i : i + 1])[0], together[i])


@all_samplers
def test_the_way_can_be_given_as_times(sampler):
    scheduler, seen = NoiseScheduler(1000), []
    times = sampling_times(scheduler, 12, "logsnr")
    at_once = sampler(
        smooth_model, scheduler, pure_noise(), 12, spacing="logsnr", step_noise=noise_source()
    )
    keep = lambda k, t, x, x_0: seen.append((k, t))
    by_times = sampler(
        smooth_model, scheduler, pure_noise(), times, step_noise=noise_source(), on_step=keep
    )
    assert torch.equal(by_times, at_once)
    assert seen == list(enumerate(times[:-1]))


# The others begin with order 1 anew
@pytest.mark.parametrize("sampler", [ddpm_sample, ddim_sample])
def test_the_way_can_be_taken_in_parts(sampler):
    scheduler, draw = NoiseScheduler(1000), noise_source()
    times, draws = sampling_times(scheduler, 12, "logsnr"), [draw(k) for k in range(12)]

    def part(x, first, last):
        noise = draws[first:last].__getitem__
        return sampler(
            smooth_model, scheduler, x, times[first : last + 1], clip_x_0=False, step_noise=noise
        )

    second, at_once = part(part(pure_noise(), 0, 5), 5, 12), part(pure_noise(), 0, 12)
    torch.testing.assert_close(second, at_once, rtol=1e-12, atol=1e-12)


@all_samplers
def test_the_loop_reads_no_number_from_the_device(sampler):
    """On the meta device nothing has a value, so that asking for one raises an error."""
    sampler(lambda x_t, t: x_t, NoiseScheduler(100), torch.ones(SHAPE, device="meta"), 10)


@all_samplers
def test_what_the_model_said_is_kept_for_as_long_as_the_method_needs_it(sampler):
    outputs, alive = [], []

    def model(x_t, t):
        alive.append(sum(output() is not None for output in outputs))
        outputs.append(weakref.ref(eps := 0.1 * x_t))
        return eps

    sampler(model, NoiseScheduler(100), torch.ones(SHAPE), 40, clip_x_0=False)
    assert max(alive) <= (4 if sampler is ipndm_sample else 1)


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        (ddpm_sample, {"variance": "medium"}, "variance is 'medium'; it can be small or large"),
        (ddim_sample, {"eta": 1.5}, "eta is 1.5; it can be 0 to 1"),
        (dpm_solver_sample, {"eta": -0.5}, "eta is -0.5; it can be 0 to 1"),
    ],
)
def test_what_makes_no_sense_is_refused(sampler, options, message):
    with pytest.raises(ValueError, match=message):
        sampler(smooth_model, NoiseScheduler(100), torch.randn(SHAPE), **options)
