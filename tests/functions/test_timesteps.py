"""Which timesteps a sampler visits, and which a training draws."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from functions.noise_scheduler import NoiseScheduler
from functions.timesteps import SPACINGS, logsnr_timesteps, sampling_times


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_times_are_as_many_as_asked_for_and_fall_to_the_image(data):
    timesteps = data.draw(st.integers(21, 300))
    steps = data.draw(st.none() | st.just(timesteps) | st.integers(1, timesteps))
    spacing = data.draw(st.sampled_from(SPACINGS))
    times = sampling_times(NoiseScheduler(timesteps), steps, spacing)

    # So all T steps visit all timesteps.
    assert len(times) == (steps or timesteps) + 1
    assert times[0] == timesteps - 1
    assert times[-1] == -1
    assert all(type(t) is int for t in times)
    assert times == sorted(set(times), reverse=True)
    # The last call is at the least noise.
    if spacing == "logsnr" and len(times) > 2:
        assert times[-2] == 0


def test_trailing_times_are_even():
    """The truths are counted by hand: from T - 1, in steps of T / steps, rounded."""
    assert sampling_times(NoiseScheduler(1000), 5) == [999, 799, 599, 399, 199, -1]
    assert sampling_times(NoiseScheduler(1000), 7) == [999, 856, 713, 570, 428, 285, 142, -1]


def test_logsnr_times_are_even_in_the_log_snr():
    """The truth is the log-SNR of the paper's betas in NumPy.

    There are so many timesteps that rounding to whole ones hardly matters.
    """
    times = logsnr_timesteps(NoiseScheduler(100_000), 51, 50_000, 1000)
    alpha_bar = np.cumprod(1 - np.linspace(0.1, 20, 100_000) / 100_000)
    log_snr = np.log(alpha_bar / (1 - alpha_bar))
    gaps = np.diff(log_snr[times])
    assert gaps == pytest.approx([gaps.mean()] * 50, rel=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0; a model with 100 timesteps takes 1 to 100"),
        ({"steps": 101}, "steps is 101; a model with 100 timesteps takes 1 to 100"),
        ({"steps": [9, 9, -1]}, "must be 2 or more, descending"),
        ({"steps": [9]}, "must be 2 or more, descending"),
        ({"steps": [9, -2]}, "at least -1"),
        ({"steps": [100, 9]}, "at most 99"),
        ({"spacing": "leading"}, "spacing is .leading.; it can be trailing or logsnr"),
    ],
)
def test_times_outside_the_schedule_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sampling_times(NoiseScheduler(100), **options)
