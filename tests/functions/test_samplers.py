"""The reverse process: exact recursions, and what all samplers promise."""

import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from functions.noise_scheduler import NoiseScheduler
from functions.samplers import ddim_sample, ddpm_sample, dpm_solver_sample, ipndm_sample
from functions.timesteps import sampling_times
from tests.functions.known_denoisers import Gaussian, double, mean_and_variance

SHAPE = (2, 3, 4, 4)
all_samplers = pytest.mark.parametrize("sampler", [ddpm_sample, ddim_sample, dpm_solver_sample, ipndm_sample])


def smooth_model(x_t, t):
    """Some nonlinear function of both arguments; what it is does not matter where two samplers are compared."""
    return torch.tanh(0.8 * x_t + 0.3 * torch.sin(t.double() / 90).view(-1, 1, 1, 1))


def noise_source(seed=2):
    generator = torch.Generator().manual_seed(seed)
    return lambda k: torch.randn(SHAPE, generator=generator, dtype=torch.float64)


def pure_noise(seed=1):
    return 1.5 * noise_source(seed)(0)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(("steps", "spacing"), [(100, "trailing"), (17, "trailing"), (10, "logsnr")])
def test_ddim_with_eta_1_is_ddpm(steps, spacing, clip):
    scheduler, options = NoiseScheduler(100), {"spacing": spacing, "clip_x_0": clip}
    ddpm = ddpm_sample(smooth_model, scheduler, pure_noise(), steps, step_noise=noise_source(), **options)
    ddim = ddim_sample(smooth_model, scheduler, pure_noise(), steps, 1.0, step_noise=noise_source(), **options)
    assert_close(ddim, ddpm, rtol=1e-9, atol=1e-9)


MEAN, STD = 0.3, 0.4
DATA = Gaussian(double([MEAN]), double([STD]))  # in one dimension, where the best eps is linear in x_t


def algorithm_2(timesteps):
    """Mean and variance of x_0 by Algorithm 2 of the paper, each of whose steps is linear in x_t (float64)."""
    betas = np.linspace(0.1, 20, timesteps) / timesteps
    alpha_bar = np.cumprod(1 - betas)
    mean, variance = 0.0, 1.0
    for t in reversed(range(timesteps)):
        a, b = alpha_bar[t], betas[t]
        slope = np.sqrt(1 - a) / (a * STD**2 + 1 - a)  # eps = slope (x_t - sqrt(a) m)
        gain = (1 - b / np.sqrt(1 - a) * slope) / np.sqrt(1 - b)
        shift = b / np.sqrt(1 - a) * slope * np.sqrt(a) * MEAN / np.sqrt(1 - b)
        sigma2 = b * (1 - alpha_bar[t - 1]) / (1 - a) if t > 0 else 0.0
        mean, variance = gain * mean + shift, gain**2 * variance + sigma2
    return mean, variance


def deterministic_ddim(times):
    """The same by DDIM with eta = 0 and T = 1000."""
    alpha_bar = np.append(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)), 1.0)  # [-1] is the clean image
    mean, variance = 0.0, 1.0
    for t, following in pairwise(times):
        a, a_next = alpha_bar[t], alpha_bar[following]
        slope = np.sqrt(1 - a) / (a * STD**2 + 1 - a)
        weight = np.sqrt(1 - a_next) - np.sqrt(a_next / a) * np.sqrt(1 - a)  # x_next = sqrt(a_next / a) x + weight eps
        gain, shift = np.sqrt(a_next / a) + weight * slope, -weight * slope * np.sqrt(a) * MEAN
        mean, variance = gain * mean + shift, gain**2 * variance
    return mean, variance


@pytest.mark.parametrize("timesteps", [50, 200])
def test_ddpm_is_algorithm_2(timesteps):
    times = list(range(timesteps - 1, -2, -1))
    found = mean_and_variance(DATA, ddpm_sample, NoiseScheduler(timesteps), times)
    assert found == pytest.approx(algorithm_2(timesteps), rel=1e-9)


@pytest.mark.parametrize("steps", [10, 50])
def test_ddim_is_its_recursion(steps):
    scheduler = NoiseScheduler(1000)
    times = sampling_times(scheduler, steps)
    assert mean_and_variance(DATA, ddim_sample, scheduler, times) == pytest.approx(deterministic_ddim(times), rel=1e-9)


@all_samplers
def test_clipping_is_that_of_a_model_whose_eps_agrees_with_the_clipped_x_0(sampler):
    scheduler, predictions = NoiseScheduler(100), []
    keep = lambda k, t, x, x_0: predictions.append(x_0)

    def clipped_model(x_t, t):
        x_0 = scheduler.predict_x_0(x_t, t, smooth_model(x_t, t)).clamp(-1, 1)
        return scheduler.predict_eps(x_t, t, x_0)

    ours = sampler(smooth_model, scheduler, pure_noise(), 20, step_noise=noise_source(), on_step=keep)
    expected = sampler(clipped_model, scheduler, pure_noise(), 20, clip_x_0=False, step_noise=noise_source())
    assert_close(ours, expected.clamp(-1, 1), rtol=1e-9, atol=1e-9)
    assert torch.stack(predictions).abs().max() == 1


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
    sampled = lambda some: sampler(smooth_model, NoiseScheduler(100), some[-1], 12, step_noise=lambda k: some[k])
    together = sampled(noises)
    for i in range(5):
        assert torch.equal(sampled(noises[:, i : i + 1])[0], together[i])


@all_samplers
def test_the_way_can_be_given_as_times(sampler):
    scheduler, seen = NoiseScheduler(1000), []
    times = sampling_times(scheduler, 12, "logsnr")
    at_once = sampler(smooth_model, scheduler, pure_noise(), 12, spacing="logsnr", step_noise=noise_source())
    by_times = sampler(smooth_model, scheduler, pure_noise(), times, step_noise=noise_source(),
                       on_step=lambda k, t, x, x_0: seen.append((k, t)))  # fmt: skip
    assert torch.equal(by_times, at_once)
    assert seen == list(enumerate(times[:-1]))


@pytest.mark.parametrize("sampler", [ddpm_sample, ddim_sample])  # the others begin with order 1 anew
def test_the_way_can_be_taken_in_parts(sampler):
    scheduler, draw = NoiseScheduler(1000), noise_source()
    times, draws = sampling_times(scheduler, 12, "logsnr"), [draw(k) for k in range(12)]

    def part(x, first, last):
        noise = draws[first:last].__getitem__
        return sampler(smooth_model, scheduler, x, times[first : last + 1], clip_x_0=False, step_noise=noise)

    second, at_once = part(part(pure_noise(), 0, 5), 5, 12), part(pure_noise(), 0, 12)
    assert_close(second, at_once, rtol=1e-12, atol=1e-12)


@all_samplers
def test_the_loop_reads_no_number_from_the_device(sampler):
    """On the meta device nothing has a value, so that asking for one raises an error."""
    sampler(lambda x_t, t: x_t, NoiseScheduler(100), torch.ones(SHAPE, device="meta"), 10)


@all_samplers
def test_what_the_model_said_is_kept_for_as_long_as_the_method_needs_it(sampler):
    outputs, alive = [], []

    def model(x_t, t):
        alive.append(sum(output() is not None for output in outputs))
        eps = 0.1 * x_t
        outputs.append(weakref.ref(eps))
        return eps

    sampler(model, NoiseScheduler(100), torch.ones(SHAPE), 40, clip_x_0=False)
    assert max(alive) <= (4 if sampler is ipndm_sample else 1)


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        (ddpm_sample, {"variance": "medium"}, "variance is 'medium'; it can be small or large"),
        (ddpm_sample, {"steps": 0}, "steps is 0"),
        (ddim_sample, {"eta": 1.5}, "eta is 1.5; it can be 0 to 1"),
        (ddim_sample, {"steps": 101}, "steps is 101"),
        (dpm_solver_sample, {"eta": -0.5}, "eta is -0.5; it can be 0 to 1"),
        (dpm_solver_sample, {"spacing": "even"}, "spacing is 'even'"),
        (ipndm_sample, {"steps": [9]}, "must be 2 or more, falling"),
    ],
)
def test_what_makes_no_sense_is_refused(sampler, options, message):
    with pytest.raises(ValueError, match=message):
        sampler(smooth_model, NoiseScheduler(100), torch.randn(SHAPE), **options)
