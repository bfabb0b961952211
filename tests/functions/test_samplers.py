"""The reverse process: exact recursions, and what all samplers promise."""

import gc
import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from functions.noise_scheduler import NoiseScheduler
from functions.prediction import Denoiser
from functions.samplers import (
    ddim_sample,
    ddpm_sample,
    dpm_solver_sample,
    ipndm_sample,
)
from functions.sampling.generation import ImageSampler
from functions.sampling.options import SAMPLERS as OPTIONS
from functions.sampling.options import SamplerOptions
from functions.timesteps import sampling_times

SHAPE = (2, 3, 4, 4)
SAMPLERS = [ddpm_sample, ddim_sample, dpm_solver_sample, ipndm_sample]
all_samplers = pytest.mark.parametrize("sampler", SAMPLERS)


def smooth_model(x_t, t):
    """Some nonlinear function of both arguments; what it is does not matter where two samplers are compared."""
    return torch.tanh(0.8 * x_t + 0.3 * torch.sin(t.double() / 90).view(-1, 1, 1, 1))


def noise_source(seed):
    generator = torch.Generator().manual_seed(seed)
    return generator, lambda k: torch.randn(SHAPE, generator=generator, dtype=torch.float64)


def pure_noise(seed=1):
    return 1.5 * torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(("steps", "spacing"), [(100, "trailing"), (17, "trailing"), (10, "logsnr")])
def test_ddim_with_eta_1_is_ddpm(steps, spacing, clip):
    scheduler, options = NoiseScheduler(100), {"spacing": spacing, "clip_x_0": clip}
    ddpm = ddpm_sample(smooth_model, scheduler, pure_noise(), steps, step_noise=noise_source(3)[1], **options)
    ddim = ddim_sample(smooth_model, scheduler, pure_noise(), steps, 1.0, step_noise=noise_source(3)[1], **options)
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
    times = sampling_times(NoiseScheduler(timesteps), steps)
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


@all_samplers
def test_clipping_keeps_every_prediction_in_range(sampler):
    scheduler, predictions = NoiseScheduler(100), []
    x_T = 3 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    wild = lambda x_t, t: -2 * x_t
    x_0 = sampler(wild, scheduler, x_T, 20, on_step=lambda k, t, x, x_0: predictions.append(x_0))
    assert torch.stack(predictions).abs().max() == 1
    assert x_0.abs().max() <= 1
    assert sampler(wild, scheduler, x_T, 20, clip_x_0=False).abs().max() > 1


@all_samplers
def test_clipping_is_that_of_a_model_whose_eps_agrees_with_the_clipped_x_0(sampler):
    scheduler = NoiseScheduler(100)

    def clipped_model(x_t, t):
        x_0 = scheduler.predict_x_0(x_t, t, smooth_model(x_t, t)).clamp(-1, 1)
        return scheduler.predict_eps(x_t, t, x_0)

    ours = sampler(smooth_model, scheduler, pure_noise(), 20, step_noise=noise_source(2)[1])
    expected = sampler(clipped_model, scheduler, pure_noise(), 20, clip_x_0=False, step_noise=noise_source(2)[1])
    assert_close(ours, expected.clamp(-1, 1), rtol=1e-9, atol=1e-9)


@all_samplers
def test_eps_scale_divides_what_the_model_says(sampler):
    scheduler, source, name = (
        NoiseScheduler(100),
        lambda: noise_source(2)[1],
        {f: n for n, f in OPTIONS.items()}[sampler],
    )

    def sampled(model, eps_scale):
        options, draw = SamplerOptions(name, 20, eps_scale=eps_scale), source()
        image_sampler = ImageSampler(Denoiser(model, scheduler), options, SHAPE[1:], 0, torch.device("cpu"))
        return image_sampler.decode(pure_noise(), 99, lambda: draw(0))

    scaled = sampled(smooth_model, 1.25)
    assert_close(scaled, sampled(lambda x_t, t: smooth_model(x_t, t) / 1.25, 1.0), rtol=1e-4, atol=1e-5)
    assert (scaled - sampled(smooth_model, 1.0)).abs().max() > 0.01


def test_noise_is_asked_for_once_a_step_and_not_at_the_end():
    scheduler, asked = NoiseScheduler(100), []
    draw = lambda k: asked.append(k) or torch.randn(SHAPE)
    ddpm_sample(smooth_model, scheduler, torch.randn(SHAPE), step_noise=draw)
    assert asked == list(range(99))
    asked.clear()
    ddpm_sample(smooth_model, scheduler, torch.randn(SHAPE), steps=[60, 40, 20], step_noise=draw)
    assert asked == [0, 1]  # 20 is not the end: there noise is left
    asked.clear()
    dpm_solver_sample(smooth_model, scheduler, torch.randn(SHAPE), 10, 1.0, step_noise=draw)
    assert asked == list(range(9))
    asked.clear()
    for sampler in (ddim_sample, dpm_solver_sample, ipndm_sample):
        sampler(smooth_model, scheduler, torch.randn(SHAPE), 10, step_noise=draw)
    assert asked == []


@pytest.mark.parametrize("options", [{"steps": 12}, {"steps": [70, 50, 33, 20, 4]}])
@all_samplers
def test_a_sample_depends_on_its_own_noise_alone(sampler, options):
    noises = [torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(k)) for k in range(13)]
    together = sampler(smooth_model, NoiseScheduler(100), noises[-1], step_noise=lambda k: noises[k], **options)
    assert together.shape == (5, 3, 4, 4)
    for i in range(5):
        alone = sampler(smooth_model, NoiseScheduler(100), noises[-1][i : i + 1],
                        step_noise=lambda k, i=i: noises[k][i : i + 1], **options)  # fmt: skip
        assert torch.equal(alone[0], together[i])


@all_samplers
def test_the_way_can_be_given_as_times(sampler):
    scheduler, source = NoiseScheduler(1000), lambda: noise_source(2)[1]
    at_once = sampler(smooth_model, scheduler, pure_noise(), 12, spacing="logsnr", step_noise=source())
    times = sampling_times(scheduler, 12, "logsnr")
    assert torch.equal(sampler(smooth_model, scheduler, pure_noise(), steps=times, step_noise=source()), at_once)


@pytest.mark.parametrize("sampler", [ddpm_sample, ddim_sample])  # the others begin with order 1 anew
def test_the_way_can_be_taken_in_parts(sampler):
    scheduler, draw = NoiseScheduler(1000), noise_source(2)[1]
    times, draws = sampling_times(scheduler, 12, "logsnr"), [draw(k) for k in range(12)]

    def part(x, first, last):
        noise = draws[first:last].__getitem__
        return sampler(smooth_model, scheduler, x, steps=times[first : last + 1], clip_x_0=False, step_noise=noise)

    second, at_once = part(part(pure_noise(), 0, 5), 5, 12), part(pure_noise(), 0, 12)
    assert_close(second, at_once, rtol=1e-12, atol=1e-12)


@all_samplers
def test_on_step_sees_every_step(sampler):
    seen = []
    sampler(smooth_model, NoiseScheduler(100), pure_noise(), 10, on_step=lambda k, t, x, x_0: seen.append((k, t)))
    assert seen == list(enumerate(range(99, 0, -10)))


class Operations(TorchDispatchMode):
    """The names of all that PyTorch computes within."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_loop_is_arithmetic_alone(sampler):
    """No reading of numbers from the device, no sending of numbers to it, and little work a step.

    The schedule's are read on the CPU, which the meta device shows.
    """
    calls = []
    with Operations() as operations:
        sampler(lambda x_t, t: calls.append(len(operations.names)) or x_t, NoiseScheduler(100), torch.ones(SHAPE), 10)
    in_loop = operations.names[calls[0] :]
    assert set(in_loop) <= {
        "mul",
        "add",
        "sub",
        "div",
        "clamp",
        "full",
        "detach",
        "randn_like",
        "select",
        "_local_scalar_dense",
    }
    assert len(in_loop) < 10 * 40
    # On the meta device nothing has a value, so that asking for one raises an error.
    sampler(lambda x_t, t: x_t, NoiseScheduler(100), torch.ones(SHAPE, device="meta"), 10)


@all_samplers
def test_what_the_model_said_is_kept_for_as_long_as_the_method_needs_it(sampler):
    outputs, alive = [], []

    def model(x_t, t):
        alive.append(sum(output() is not None for output in outputs))
        eps = 0.1 * x_t
        outputs.append(weakref.ref(eps))
        return eps

    gc.collect()
    sampler(model, NoiseScheduler(100), torch.ones(SHAPE), 40, clip_x_0=False)
    assert max(alive) <= (4 if sampler is ipndm_sample else 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@all_samplers
def test_the_loop_never_waits_for_the_gpu(sampler):
    watch = lambda k, t, x, x_0: torch.cuda.set_sync_debug_mode("error" if k < 9 else "default")
    try:
        sampler(lambda x_t, t: x_t, NoiseScheduler(100), torch.ones(SHAPE, device="cuda"), 10, on_step=watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("steps", [0, -1, 101])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_steps_that_the_model_does_not_have_are_refused(sampler, steps):
    with pytest.raises(ValueError, match=f"steps is {steps}"):
        sampler(smooth_model, NoiseScheduler(100), torch.randn(SHAPE), steps)


@pytest.mark.parametrize(("sampler", "options", "message"), [
    (ddpm_sample, {"variance": "medium"}, "variance is 'medium'; it can be small or large"),
    (ddim_sample, {"eta": 1.5}, "eta is 1.5; it can be 0 to 1"),
    (dpm_solver_sample, {"spacing": "even"}, "spacing is 'even'"),
    (ddim_sample, {"steps": [9, 9, -1]}, "must be 2 or more, falling"),
    (ddim_sample, {"steps": [9]}, "must be 2 or more, falling"),
    (ddim_sample, {"steps": [9, -2]}, "at least -1"),
    (ddim_sample, {"steps": [100, 9]}, "at most 99"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(sampler, options, message):
    with pytest.raises(ValueError, match=message):
        sampler(smooth_model, NoiseScheduler(100), torch.randn(SHAPE), **options)
