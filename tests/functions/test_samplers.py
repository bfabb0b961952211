"""The reverse process: what all samplers promise, and the timesteps that they visit."""

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from config import EXPERIMENTS
from functions.denoiser import Denoiser
from functions.likelihood import model_variance
from functions.noise_scheduler import BETA_SCHEDULES, NoiseScheduler
from functions.optimizers import LR_SCHEDULES
from functions.samplers import SAMPLERS, VARIANCES, ddpm_sample
from functions.timesteps import SPACINGS, sampling_times
from tests.conftest import refused
from tests.functions.known_denoisers import exact

SHAPE = (2, 3, 4, 4)
SCHEDULER = NoiseScheduler(100)
FACES = EXPERIMENTS["faces"].diffusion
all_samplers = pytest.mark.parametrize("row", SAMPLERS.values(), ids=SAMPLERS)
# Options that only some samplers have, with the values that tests give them.
VALUES = {"eta": (0.0, 0.5, 1.0), "variance": VARIANCES}
# A pair (row, options) for each sampler with each value of one of its options.
CASES = [
    (row, options)
    for row in SAMPLERS.values()
    for options in [{name: v} for name in row.options for v in VALUES.get(name, ())] or [{}]
]


def smooth(x_t, t):
    """Return some nonlinear function of both arguments.

    What it is does not matter where two samplers are compared.
    """
    return torch.tanh(0.8 * x_t + 0.3 * torch.sin(t.double() / 90).view(-1, 1, 1, 1))


DENOISER = exact(smooth, SCHEDULER)


def noise_source(seed=2):
    """Return a `step_noise` that draws from a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    return lambda k: torch.randn(SHAPE, generator=generator, dtype=torch.float64)


def pure_noise():
    return 1.5 * noise_source(1)(0)


@all_samplers
def test_clipping_is_that_of_a_model_whose_eps_agrees_with_the_clipped_x_0(row):
    """A sampler that clips is compared with one that does not, whose model clips by itself."""
    predictions = []

    def wild(x_t, t):
        return smooth(x_t, t) - 2 * x_t

    def clipped(x_t, t):
        x_0 = SCHEDULER.predict_x_0(x_t, t, wild(x_t, t)).clamp(-1, 1)
        return SCHEDULER.predict_eps(x_t, t, x_0)

    def sampled(network, **options):
        denoiser = exact(network, SCHEDULER)
        return row.function(denoiser, pure_noise(), 20, step_noise=noise_source(), **options)

    ours = sampled(wild, on_step=lambda k, t, x, x_0: predictions.append(x_0))
    assert_close(ours, sampled(clipped, clip_x_0=False), rtol=1e-9, atol=1e-9)
    assert torch.stack(predictions).abs().max() == 1
    # Rounding may lead a little beyond the range of images.
    assert ours.abs().max() < 1 + 1e-9


def noise_steps(row, options, *steps):
    """Return the steps k for which a sampler wants noise."""
    calls = []

    def step_noise(k):
        calls.append(k)
        return torch.randn(SHAPE)

    row.function(DENOISER, torch.randn(SHAPE), *steps, **options, step_noise=step_noise)
    return calls


@pytest.mark.parametrize("row, options", CASES)
def test_noise_is_asked_for_once_a_step_and_not_at_the_end(row, options):
    every = noise_steps(row, options)
    assert every in ([], list(range(99)))
    if "eta" in options:
        assert bool(every) == (options["eta"] > 0)
    # A way that ends at t = 20 ends before the clean image, so noise is left there.
    assert noise_steps(row, options, [60, 40, 20]) == every[:2]


@pytest.mark.parametrize(
    "table, use",
    [
        (SPACINGS, lambda: sampling_times(SCHEDULER, 2, "new")),
        (VARIANCES, lambda: ddpm_sample(DENOISER, pure_noise(), [5, 3], "new")),
        (VARIANCES, lambda: model_variance(SCHEDULER, torch.tensor([50]), "new")),
        (BETA_SCHEDULES, lambda: NoiseScheduler(2, beta_schedule="new")),
        (LR_SCHEDULES, lambda: replace(FACES, lr_schedule="new").rate_of(1, 2)),
    ],
)
def test_a_new_name_is_refused_until_its_table_has_it(table, use, monkeypatch):
    """Its row raises an error of its own."""
    with pytest.raises((KeyError, ValueError), match="new"):
        use()
    monkeypatch.setitem(table, "new", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        use()


@all_samplers
def test_the_way_can_be_given_as_times_and_taken_in_parts(row):
    """The truth is the way that is given as a number of steps."""
    times = sampling_times(SCHEDULER, 12, "logsnr")
    draw = noise_source()
    draws = [draw(k) for k in range(12)]
    visited = []

    def part(x, first, last, steps=None):
        return row.function(
            DENOISER,
            x,
            steps or times[first : last + 1],
            spacing="logsnr",
            step_noise=draws[first:last].__getitem__,
            on_step=lambda k, t, x, x_0: visited.append((k, t)),
        )

    at_once = part(pure_noise(), 0, 12, steps=12)
    assert visited == list(enumerate(times[:-1]))
    assert torch.equal(part(pure_noise(), 0, 12), at_once)
    # With one call a step, a higher order looks back, and would begin the second part anew.
    if row.order == 1:
        half_way = part(pure_noise(), 0, 5)
        assert_close(part(half_way, 5, 12), at_once, rtol=1e-12, atol=1e-12)


@all_samplers
def test_the_loop_reads_no_number_from_the_device(row):
    """On the meta device nothing has a value, so that asking for one raises an error."""
    with mock.patch.object(Denoiser, "__call__", lambda self, x_t, t: x_t):
        row.function(DENOISER, torch.ones(SHAPE, device="meta"), 10)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_times_are_as_many_as_asked_for_and_fall_to_the_image(data):
    timesteps = data.draw(st.integers(21, 300))
    steps = data.draw(st.none() | st.just(timesteps) | st.integers(1, timesteps))
    spacing = data.draw(st.sampled_from([*SPACINGS]))
    times = sampling_times(NoiseScheduler(timesteps), steps, spacing)

    # So all T steps visit all timesteps.
    assert len(times) == (steps or timesteps) + 1
    assert times[0] == timesteps - 1
    assert times[-1] == -1
    assert all(type(t) is int for t in times)
    assert times == sorted(set(times), reverse=True)
    # The last call is at the least noise.
    if spacing == "logsnr" and len(times) > 3:
        assert times[-2] == 0


def test_trailing_times_are_even():
    """The truths are counted by hand: from T - 1, in steps of T / steps, rounded."""
    assert sampling_times(NoiseScheduler(1000), 7) == [999, 856, 713, 570, 428, 285, 142, -1]


@pytest.mark.parametrize(
    "beta_end, steps, start",
    [
        (26, 101, -9),
        # Those of T - 1 are -10 and -7.5.
        (20, 101, None),
        (15, 101, None),
    ],
)
def test_logsnr_times_are_even_in_the_log_snr(beta_end, steps, start):
    """The truth is the log-SNR of such betas in NumPy; without a start it is that of T - 1.

    There are so many timesteps that rounding to whole ones hardly matters, but for the last ones.
    """
    T = 100_000
    scheduler = NoiseScheduler(T, 0.1 / T, beta_end / T, rescale_betas=False)
    alpha_bar = np.cumprod(1 - np.linspace(0.1, beta_end, T) / T)
    log_snr = np.log(alpha_bar / (1 - alpha_bar))
    assert (log_snr[-1] < -12) == (beta_end == 26)

    times = sampling_times(scheduler, steps, "logsnr")
    assert len(times) == steps + 1
    assert times[0] == T - 1
    if start:
        del times[0]
        assert log_snr[times[0]] == pytest.approx(start, abs=0.001)
    # The last call is at t = 0.
    expected = (log_snr[0] - log_snr[times[0]]) / (len(times) - 2)
    times = [t for t in times if t >= 1000]
    assert len(times) > steps / 2
    assert np.diff(log_snr[times]) == pytest.approx([expected] * (len(times) - 1), rel=0.01)


def test_one_or_two_logsnr_times_begin_at_the_end_of_the_noise():
    scheduler = NoiseScheduler(1000, beta_schedule="cosine")
    assert sampling_times(scheduler, 1, "logsnr") == [999, -1]
    _, second, _ = sampling_times(scheduler, 2, "logsnr")
    assert scheduler.log_snr(second) == pytest.approx(-9, abs=0.1)
    assert sampling_times(scheduler, 20, "logsnr")[:4] == [999, second, 987, 978]


@pytest.mark.parametrize("steps", [0, 101, 2.5])
def test_steps_that_do_not_exist_are_refused(steps):
    with refused(f"steps is {steps}; a model with 100 timesteps takes 1 to", ValueError):
        sampling_times(SCHEDULER, steps)
    assert sampling_times(SCHEDULER, 20.0) == sampling_times(SCHEDULER, 20)
