"""The reverse process: what all samplers promise, and the timesteps that they visit."""

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from config import EXPERIMENTS, ConfigError
from functions.denoiser import Denoiser
from functions.likelihood import model_variance
from functions.noise_scheduler import BETA_SCHEDULES, NoiseScheduler
from functions.optimizers import LR_SCHEDULES, rate_of
from functions.samplers import SAMPLERS, VARIANCES, ddpm_sample
from functions.timesteps import SPACINGS, sampling_times
from tests.conftest import normal, refused
from tests.functions.known_denoisers import exact

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
X_T = 1.5 * normal(1, 2, 3, 4, 4, dtype=torch.float64)
DRAWS = normal(2, 20, *X_T.shape, dtype=torch.float64)


def smooth(x_t, t):
    """Return some nonlinear function of both arguments.

    What it is does not matter where two samplers are compared.
    """
    return torch.tanh(0.8 * x_t + 0.3 * torch.sin(t.double() / 90).view(-1, 1, 1, 1))


DENOISER = exact(smooth, SCHEDULER)


@all_samplers
def test_clipping_is_that_of_a_model_whose_eps_agrees_with_the_clipped_x_0(row):
    """A sampler that clips is compared with one that does not, whose model clips by itself."""

    def clipped(x_t, t):
        x_0 = SCHEDULER.predict_x_0(x_t, t, smooth(x_t, t)).clamp(-1, 1)
        return SCHEDULER.predict_eps(x_t, t, x_0)

    def sampled(network, **options):
        denoiser = exact(network, SCHEDULER)
        return row.function(denoiser, X_T, 20, step_noise=DRAWS.__getitem__, **options)

    ours = sampled(smooth)
    assert_close(ours, sampled(clipped, clip_x_0=False), rtol=1e-9, atol=1e-9)
    assert (ours - sampled(smooth, clip_x_0=False)).abs().max() > 0.1


@pytest.mark.parametrize("row, options", CASES)
def test_noise_is_asked_for_once_a_step_and_not_at_the_end(row, options):
    step_noise = mock.Mock(side_effect=DRAWS.__getitem__)
    row.function(DENOISER, X_T, 20, **options, step_noise=step_noise)
    steps = 0 if options.get("eta") == 0 else 19
    assert step_noise.mock_calls == [mock.call(k) for k in range(steps)]


@pytest.mark.parametrize(
    "table, use",
    [
        (SPACINGS, lambda: sampling_times(SCHEDULER, 2, "new")),
        (VARIANCES, lambda: ddpm_sample(DENOISER, X_T, [5, 3], "new")),
        (VARIANCES, lambda: model_variance(SCHEDULER, torch.tensor([50]), "new")),
        (BETA_SCHEDULES, lambda: NoiseScheduler(2, beta_schedule="new")),
        (LR_SCHEDULES, lambda: rate_of(replace(FACES, lr_schedule="new"), 1, 2)),
    ],
)
def test_a_new_name_is_refused_until_its_table_has_it(table, use, monkeypatch):
    """Its row raises an error of its own."""
    with pytest.raises((KeyError, ValueError, ConfigError), match="new"):
        use()
    monkeypatch.setitem(table, "new", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        use()


@all_samplers
def test_the_way_can_be_given_as_times_and_taken_in_parts(row):
    """The truth is the way that is given as a number of steps."""
    times = sampling_times(SCHEDULER, 12, "logsnr")
    visited = []

    def part(x, first, last, steps=None):
        return row.function(
            DENOISER,
            x,
            steps or times[first : last + 1],
            spacing="logsnr",
            step_noise=DRAWS[first:last].__getitem__,
            on_step=lambda k, t, x, x_0: visited.append((k, t)),
        )

    at_once = part(X_T, 0, 12, steps=12)
    assert visited == list(enumerate(times[:-1]))
    assert torch.equal(part(X_T, 0, 12), at_once)
    # With one call a step, a higher order looks back, and would begin the second part anew.
    if row.order == 1:
        half_way = part(X_T, 0, 5)
        assert_close(part(half_way, 5, 12), at_once, rtol=1e-12, atol=1e-12)


@all_samplers
def test_the_loop_reads_no_number_from_the_device(row):
    """On the meta device nothing has a value, so that asking for one raises an error."""
    with mock.patch.object(Denoiser, "__call__", lambda self, x_t, t: x_t):
        row.function(DENOISER, X_T.to("meta"), 10)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_times_are_as_many_as_asked_for_and_fall_to_the_image(data):
    timesteps = data.draw(st.integers(21, 300))
    steps = data.draw(st.none() | st.just(timesteps) | st.integers(1, timesteps))
    spacing = data.draw(st.sampled_from([*SPACINGS]))
    schedule = data.draw(st.sampled_from([*BETA_SCHEDULES]))
    times = sampling_times(NoiseScheduler(timesteps, beta_schedule=schedule), steps, spacing)

    # So all T steps visit all timesteps.
    assert len(times) == (steps or timesteps) + 1
    assert times[0] == timesteps - 1
    assert times[-1] == -1
    assert all(type(t) is int for t in times)
    assert times == sorted(set(times), reverse=True)


def test_trailing_times_are_even():
    """The truths are counted by hand: from T - 1, in steps of T / steps, rounded."""
    assert sampling_times(NoiseScheduler(1000), 7.0) == [999, 856, 713, 570, 428, 285, 142, -1]


@pytest.mark.parametrize("beta_end, start", [(0.026, -9), (0.02, -10.1)])
def test_logsnr_times_are_even_in_the_log_snr(beta_end, start):
    """With more noise at T - 1 they are so after the first step.

    There are so many timesteps that rounding to whole ones hardly matters, but for the last ones.
    """
    T = 100_000
    scheduler = NoiseScheduler(T, beta_end=beta_end)
    first, *times, t, end = sampling_times(scheduler, 101, "logsnr")
    assert (first, t, end) == (T - 1, 0, -1)
    if beta_end < 0.026:
        times = [first, *times]
    log_snr = [scheduler.log_snr(t) for t in times if t >= 1000]
    assert log_snr[0] == pytest.approx(start, abs=0.05)
    width = (scheduler.log_snr(0) - log_snr[0]) / len(times)
    assert np.diff(log_snr) == pytest.approx(width, rel=0.01)


def test_few_steps_of_logsnr_are_those_of_trailing():
    """Else two would visit 999 and 992, where both networks see noise alone."""
    scheduler = NoiseScheduler(1000, beta_schedule="cosine")
    assert sampling_times(scheduler, 2, "logsnr") == [999, 499, -1]
    assert sampling_times(scheduler, 3, "logsnr") == [999, 666, 332, -1]
    assert 100 < sampling_times(scheduler, 4, "logsnr")[-3] < 900


@pytest.mark.parametrize("steps", [0, 101, 2.5])
def test_steps_that_do_not_exist_are_refused(steps):
    with refused(f"steps is {steps}; a model with 100 timesteps takes 1 to", ValueError):
        sampling_times(SCHEDULER, steps)
