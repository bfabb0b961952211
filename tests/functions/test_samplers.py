"""The reverse process: exact recursions, and what all samplers promise."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from functions.noise_scheduler import NoiseScheduler
from functions.samplers import SAMPLERS, ddim_sample, ddpm_sample, dpm_solver_sample, ipndm_sample
from functions.timesteps import sampling_times
from tests.functions.known_denoisers import Gaussian, double, mean_and_variance

SHAPE = (2, 3, 4, 4)
FUNCTIONS = [row.function for row in SAMPLERS.values()]
all_samplers = pytest.mark.parametrize("sampler", FUNCTIONS, ids=SAMPLERS)


def smooth_model(x_t, t):
    """Return some nonlinear function of both arguments.

    What it is does not matter where two samplers are compared.
    """
    return torch.tanh(0.8 * x_t + 0.3 * torch.sin(t.double() / 90).view(-1, 1, 1, 1))


def noise_source(seed=2):
    """Return a `step_noise` that draws from a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    return lambda k: torch.randn(SHAPE, generator=generator, dtype=torch.float64)


def pure_noise(seed=1):
    return 1.5 * noise_source(seed)(0)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(
    ("steps", "spacing"),
    [
        (100, "trailing"),
        (17, "trailing"),
        (10, "logsnr"),
    ],
)
def test_ddim_with_eta_1_is_ddpm(steps, spacing, clip):
    """Both get the same x_T and the same noise in each step."""

    def sampled(sampler, **options):
        return sampler(
            smooth_model,
            NoiseScheduler(100),
            pure_noise(),
            steps,
            spacing=spacing,
            clip_x_0=clip,
            step_noise=noise_source(),
            **options,
        )

    ddpm = sampled(ddpm_sample)
    ddim = sampled(ddim_sample, eta=1.0)
    assert_close(ddim, ddpm, rtol=1e-9, atol=1e-9)


def algorithm_2(a, a_s):
    """Return the factors of x_t and of eps, and the variance of the noise, for one step.

    They are those in line 4 of Algorithm 2 (Ho et al. 2020).
    """
    beta = 1 - a / a_s
    of_x = 1 / np.sqrt(1 - beta)
    of_eps = -beta / np.sqrt(1 - a) / np.sqrt(1 - beta)
    return of_x, of_eps, beta * (1 - a_s) / (1 - a)


def eq_12(a, a_s):
    """Return the same for DDIM with eta = 0, from Eq. 12 (Song et al. 2021)."""
    of_x = np.sqrt(a_s / a)
    of_eps = np.sqrt(1 - a_s) - of_x * np.sqrt(1 - a)
    return of_x, of_eps, 0.0


@pytest.mark.parametrize(
    ("sampler", "formula", "timesteps", "steps"),
    [
        (ddpm_sample, algorithm_2, 50, 50),
        (ddpm_sample, algorithm_2, 200, 200),
        (ddim_sample, eq_12, 1000, 10),
        (ddim_sample, eq_12, 1000, 50),
    ],
)
def test_the_distribution_is_exactly_that_of_the_paper_s_formula(
    sampler, formula, timesteps, steps
):
    """Follow mean and variance through the paper's update, for data of one dimension.

    With x_0 ~ N(m, s^2) the ideal eps is linear in x_t, so every state is Gaussian.
    """
    m = 0.3
    s = 0.4
    scheduler = NoiseScheduler(timesteps)
    times = sampling_times(scheduler, steps)

    # The last time is -1, and the entry there is the clean image's.
    alpha_bar = np.append(np.cumprod(1 - np.linspace(0.1, 20, timesteps) / timesteps), 1.0)
    mean = 0.0
    variance = 1.0
    for a, a_s in pairwise(alpha_bar[times]):
        of_x, of_eps, added = formula(a, a_s)
        # The ideal eps is slope (x_t - sqrt(a) m).
        slope = np.sqrt(1 - a) / (a * s**2 + 1 - a)
        mean = of_x * mean + of_eps * slope * (mean - np.sqrt(a) * m)
        variance = (of_x + of_eps * slope) ** 2 * variance + added

    data = Gaussian(double([m]), double([s]))
    found = mean_and_variance(data, sampler, scheduler, times)
    assert found == pytest.approx((mean, variance), rel=1e-9)


@all_samplers
def test_clipping_is_that_of_a_model_whose_eps_agrees_with_the_clipped_x_0(sampler):
    """A sampler that clips is compared with one that does not, whose model clips by itself."""
    scheduler = NoiseScheduler(100)
    predictions = []

    def wild(x_t, t):
        return smooth_model(x_t, t) - 2 * x_t

    def clipped(x_t, t):
        x_0 = scheduler.predict_x_0(x_t, t, wild(x_t, t)).clamp(-1, 1)
        return scheduler.predict_eps(x_t, t, x_0)

    ours = sampler(
        wild,
        scheduler,
        pure_noise(),
        20,
        step_noise=noise_source(),
        on_step=lambda k, t, x, x_0: predictions.append(x_0),
    )
    expected = sampler(
        clipped,
        scheduler,
        pure_noise(),
        20,
        clip_x_0=False,
        step_noise=noise_source(),
    )

    # iPNDM's last state may lie outside the range, where only the sampler that clips clips it.
    assert_close(ours, expected.clamp(-1, 1), rtol=1e-9, atol=1e-9)
    assert torch.stack(predictions).abs().max() == 1
    assert ours.abs().max() <= 1


def test_noise_is_asked_for_once_a_step_and_not_at_the_end():
    def asked(sampler, *arguments):
        """Return the steps k for which the sampler wanted noise."""
        calls = []

        def step_noise(k):
            calls.append(k)
            return torch.randn(SHAPE)

        x_T = torch.randn(SHAPE)
        sampler(smooth_model, NoiseScheduler(100), x_T, *arguments, step_noise=step_noise)
        return calls

    assert asked(ddpm_sample) == list(range(99))
    # A way that ends at t = 20 ends before the clean image, so noise is left there.
    assert asked(ddpm_sample, [60, 40, 20]) == [0, 1]
    assert asked(dpm_solver_sample, 10, 1.0) == list(range(9))

    for deterministic in (ddim_sample, dpm_solver_sample, ipndm_sample):
        assert asked(deterministic, 10) == []


@all_samplers
def test_a_sample_depends_on_its_own_noise_alone(sampler):
    """A sample that is made alone is, bit for bit, the one that is made with four others."""
    # Of these draws the last is x_T.
    noises = torch.randn(13, 5, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def sampled(draws):
        return sampler(
            smooth_model,
            NoiseScheduler(100),
            draws[-1],
            12,
            step_noise=draws.__getitem__,
        )

    together = sampled(noises)
    for i in range(5):
        alone = sampled(noises[:, i : i + 1])
        assert torch.equal(alone[0], together[i])


@all_samplers
def test_the_way_can_be_given_as_times(sampler):
    scheduler = NoiseScheduler(1000)
    times = sampling_times(scheduler, 12, "logsnr")
    by_number = sampler(
        smooth_model,
        scheduler,
        pure_noise(),
        12,
        spacing="logsnr",
        step_noise=noise_source(),
    )
    visited = []
    by_times = sampler(
        smooth_model,
        scheduler,
        pure_noise(),
        times,
        step_noise=noise_source(),
        on_step=lambda k, t, x, x_0: visited.append((k, t)),
    )
    assert torch.equal(by_times, by_number)
    assert visited == list(enumerate(times[:-1]))


# The other samplers look back, and would begin the second part with order 1 again.
@pytest.mark.parametrize("sampler", [ddpm_sample, ddim_sample])
def test_the_way_can_be_taken_in_parts(sampler):
    scheduler = NoiseScheduler(1000)
    times = sampling_times(scheduler, 12, "logsnr")
    draw = noise_source()
    draws = [draw(k) for k in range(12)]

    def part(x, first, last):
        return sampler(
            smooth_model,
            scheduler,
            x,
            times[first : last + 1],
            clip_x_0=False,
            step_noise=draws[first:last].__getitem__,
        )

    half_way = part(pure_noise(), 0, 5)
    in_parts = part(half_way, 5, 12)
    at_once = part(pure_noise(), 0, 12)
    assert_close(in_parts, at_once, rtol=1e-12, atol=1e-12)


@all_samplers
def test_the_loop_reads_no_number_from_the_device(sampler):
    """On the meta device nothing has a value, so that asking for one raises an error."""
    sampler(lambda x_t, t: x_t, NoiseScheduler(100), torch.ones(SHAPE, device="meta"), 10)


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        (ddpm_sample, {"variance": "medium"}, "variance is 'medium'; it can be small or large"),
        (ddim_sample, {"eta": 1.5}, "eta is 1.5; it must be between 0 and 1"),
        (dpm_solver_sample, {"eta": -0.5}, "eta is -0.5; it must be between 0 and 1"),
    ],
)
def test_what_makes_no_sense_is_refused(sampler, options, message):
    with pytest.raises(ValueError, match=message):
        sampler(smooth_model, NoiseScheduler(100), torch.randn(SHAPE), **options)
