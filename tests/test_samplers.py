"""The reverse process: diffusers step for step, and data whose ideal model is known exactly."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch.testing import assert_close

from functions.noise_scheduler import NoiseScheduler
from functions.samplers import SamplingError, ddim_sample, ddpm_sample, trailing_timesteps

SHAPE = (2, 3, 4, 4)


def smooth_model(x_t, t):
    """Some nonlinear function of both arguments; what it is does not matter where two samplers are compared."""
    return torch.tanh(0.8 * x_t + 0.3 * torch.sin(t.double() / 90).view(-1, 1, 1, 1))


def noise_source(seed):
    generator = torch.Generator().manual_seed(seed)
    return generator, lambda k: torch.randn(SHAPE, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("timesteps", [1000, 100])
def test_ddpm_agrees_with_diffusers_step_for_step(timesteps, clip):
    ours, scale = NoiseScheduler(timesteps), 1000 / timesteps
    theirs = DDPMScheduler(timesteps, beta_start=1e-4 * scale, beta_end=0.02 * scale, beta_schedule="linear",
                           variance_type="fixed_small", clip_sample=clip)  # fmt: skip
    x_T = 1.5 * torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    their_generator, _ = noise_source(2)
    their_states, x = [], x_T
    for t in theirs.timesteps:
        eps = smooth_model(x, t.expand(len(x)))
        x = theirs.step(eps, t, x, generator=their_generator).prev_sample
        their_states.append(x)
    our_states = []
    x_0 = ddpm_sample(smooth_model, ours, x_T, clip_x_0=clip, step_noise=noise_source(2)[1],
                      on_step=lambda k, t, x, x_0: our_states.append(x))  # fmt: skip
    assert_close(torch.stack(our_states), torch.stack(their_states), rtol=1e-4, atol=1e-4)
    assert_close(x_0, our_states[-1])


# Numbers of steps that divide 1000: with others diffusers' own step width, 1000 // steps, leaves its own timesteps.
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(("steps", "eta"), [(1000, 0.0), (50, 0.0), (50, 1.0), (8, 0.5), (1, 0.0)])
def test_ddim_agrees_with_diffusers_step_for_step(steps, eta, clip):
    ours = NoiseScheduler(1000)
    theirs = DDIMScheduler(1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=clip,
                           timestep_spacing="trailing", set_alpha_to_one=True)  # fmt: skip
    theirs.set_timesteps(steps)
    assert theirs.timesteps.tolist() == trailing_timesteps(1000, steps)
    x_T = 1.5 * torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    generator, _ = noise_source(2)
    x = x_T
    for t in theirs.timesteps:
        eps = smooth_model(x, t.expand(len(x)))
        x = theirs.step(eps, t, x, eta=eta, use_clipped_model_output=clip, generator=generator).prev_sample
    ours_x_0 = ddim_sample(smooth_model, ours, x_T, steps, eta=eta, clip_x_0=clip, step_noise=noise_source(2)[1])
    # Without clipping, x_0 is divided by sqrt(alpha_bar_T) = 0.006, which magnifies their float32 tables' rounding.
    assert_close(ours_x_0, x, rtol=1e-3 if steps == 1 else 1e-4, atol=1e-4)


def test_ddim_with_eta_1_over_all_steps_is_ddpm():
    scheduler = NoiseScheduler(100)
    x_T = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ddpm = ddpm_sample(smooth_model, scheduler, x_T, step_noise=noise_source(3)[1])
    ddim = ddim_sample(smooth_model, scheduler, x_T, 100, eta=1.0, step_noise=noise_source(3)[1])
    assert_close(ddim, ddpm, rtol=1e-9, atol=1e-9)


MEAN, STD = 0.3, 0.4  # of the one-dimensional data below


def ideal_model(scheduler):
    """For x_0 ~ N(m, s^2), E[eps | x_t] is linear: cov(eps, x_t) / var(x_t) times what x_t is above its mean."""

    def model(x_t, t):
        a = scheduler.alphas_cumprod[t].to(x_t.dtype).view(-1, 1, 1, 1)
        return (1 - a).sqrt() * (x_t - a.sqrt() * MEAN) / (a * STD**2 + 1 - a)

    return model


def exact_ddpm(timesteps):
    """Mean and variance of Algorithm 2's x_0 with the ideal model: each of its steps is linear in x_t (float64)."""
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


def exact_ddim(timesteps, steps):
    """The same for DDIM with eta = 0."""
    alpha_bar = np.append(np.cumprod(1 - np.linspace(0.1, 20, timesteps) / timesteps), 1.0)
    times = [*trailing_timesteps(timesteps, steps), -1]
    mean, variance = 0.0, 1.0
    for t, following in pairwise(times):
        a, a_next = alpha_bar[t], alpha_bar[following]
        slope = np.sqrt(1 - a) / (a * STD**2 + 1 - a)
        weight = np.sqrt(1 - a_next) - np.sqrt(a_next / a) * np.sqrt(1 - a)  # x_next = sqrt(a_next / a) x + weight eps
        gain, shift = np.sqrt(a_next / a) + weight * slope, -weight * slope * np.sqrt(a) * MEAN
        mean, variance = gain * mean + shift, gain**2 * variance
    return mean, variance


def assert_distribution(x_0, mean, variance):
    n = x_0.numel()
    assert abs(x_0.mean().item() - mean) < 4 * (variance / n) ** 0.5
    assert abs(x_0.var().item() - variance) < 4 * variance * (2 / n) ** 0.5


@pytest.mark.parametrize("timesteps", [50, 200])
def test_ddpm_gives_exactly_the_distribution_of_its_recursion(timesteps):
    scheduler = NoiseScheduler(timesteps)
    generator = torch.Generator().manual_seed(0)
    draw = lambda k: torch.randn(4, 1, 200, 200, generator=generator, dtype=torch.float64)
    x_0 = ddpm_sample(ideal_model(scheduler), scheduler, draw(-1), clip_x_0=False, step_noise=draw)
    assert_distribution(x_0, *exact_ddpm(timesteps))


@pytest.mark.parametrize("steps", [10, 50])
def test_ddim_gives_exactly_the_distribution_of_its_recursion(steps):
    scheduler = NoiseScheduler(1000)
    x_T = torch.randn(4, 1, 200, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_0 = ddim_sample(ideal_model(scheduler), scheduler, x_T, steps, clip_x_0=False)
    assert_distribution(x_0, *exact_ddim(1000, steps))


def test_the_recursions_tend_to_the_data_as_steps_grow():
    for errors in (
        [np.subtract(exact_ddpm(timesteps), (MEAN, STD**2)) for timesteps in (50, 200, 1000, 5000)],
        [np.subtract(exact_ddim(5000, steps), (MEAN, STD**2)) for steps in (10, 50, 250, 1250)],
    ):
        sizes = np.abs(errors).max(axis=1)
        assert all(sizes[1:] < sizes[:-1] / 2), sizes
        assert sizes[-1] < 2e-3


def test_clipping_keeps_every_prediction_in_range():
    scheduler, predictions = NoiseScheduler(100), []
    x_T = 3 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    wild = lambda x_t, t: -2 * x_t
    x_0 = ddpm_sample(wild, scheduler, x_T, on_step=lambda k, t, x, x_0: predictions.append(x_0))
    assert torch.stack(predictions).abs().max() == 1
    assert x_0.abs().max() <= 1
    assert ddpm_sample(wild, scheduler, x_T, clip_x_0=False).abs().max() > 1


def test_noise_is_asked_for_once_a_step_and_not_at_the_end():
    scheduler, asked = NoiseScheduler(100), []
    draw = lambda k: asked.append(k) or torch.randn(SHAPE)
    ddpm_sample(smooth_model, scheduler, torch.randn(SHAPE), step_noise=draw)
    assert asked == list(range(99))
    asked.clear()
    ddim_sample(smooth_model, scheduler, torch.randn(SHAPE), 10, step_noise=draw)
    assert asked == []


@pytest.mark.parametrize("timesteps", [1000, 200])
def test_trailing_timesteps_start_at_the_noise_and_never_repeat(timesteps):
    for steps in range(1, timesteps + 1):
        times = trailing_timesteps(timesteps, steps)
        assert times[0] == timesteps - 1
        assert times[-1] >= 0
        assert len(set(times)) == steps
        assert times == sorted(times, reverse=True)


@pytest.mark.parametrize("steps", [0, -1, 101])
def test_steps_that_the_model_does_not_have_are_refused(steps):
    with pytest.raises(SamplingError, match=f"steps is {steps}"):
        ddim_sample(smooth_model, NoiseScheduler(100), torch.randn(SHAPE), steps)
