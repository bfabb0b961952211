"""Which timesteps a sampler visits."""

from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functions.noise_scheduler import NoiseScheduler
from functions.timesteps import SPACINGS, logsnr_timesteps, mixed_timesteps, sampling_times


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_times_are_as_many_as_asked_for_and_fall_to_the_image(data):
    timesteps = data.draw(st.integers(21, 300))
    steps = data.draw(st.none() | st.just(timesteps) | st.integers(1, timesteps))
    spacing = data.draw(st.sampled_from(SPACINGS))
    times = sampling_times(NoiseScheduler(timesteps), steps, spacing)
    assert len(times) == (steps or timesteps) + 1  # so all steps are all timesteps
    assert (times[0], times[-1]) == (timesteps - 1, -1)
    assert all(type(t) is int for t in times) and times == sorted(set(times), reverse=True)
    if spacing == "logsnr" and len(times) > 2:
        assert times[-2] == 0  # a call at the least noise


def test_trailing_times_are_even():
    assert sampling_times(NoiseScheduler(1000), 5) == [999, 799, 599, 399, 199, -1]
    assert sampling_times(NoiseScheduler(1000), 7) == [999, 856, 713, 570, 428, 285, 142, -1]


@pytest.mark.parametrize(("start", "stop"), [(99_999, 500), (50_000, 1000)])
def test_logsnr_times_are_even_in_the_log_snr(start, stop):
    times = logsnr_timesteps(NoiseScheduler(100_000), 51, start, stop)
    alpha_bar = np.cumprod(1 - np.linspace(0.1, 20, 100_000) / 100_000)
    gaps = np.diff(np.log(alpha_bar / (1 - alpha_bar))[times])
    assert gaps == pytest.approx([gaps.mean()] * 50, rel=0.01)


@pytest.mark.parametrize("beta_schedule", ["linear", "cosine"])
def test_mixed_times_are_log_normal_at_odd_places_and_as_they_were_at_even_ones(beta_schedule):
    """Each t has the share of N(-1.2, 1.2^2) that is nearer to its ln sigma than to any other's."""
    scheduler, generator = (
        NoiseScheduler(100, beta_schedule=beta_schedule),
        torch.Generator().manual_seed(0),
    )
    uniform = torch.randint(100, (200_001,), generator=generator)
    normal = torch.randn(200_001, generator=generator)
    mixed = mixed_timesteps(scheduler, uniform, normal)
    assert mixed.dtype == torch.int64 and torch.equal(mixed[::2], uniform[::2])
    ln_sigma = np.log(1 / scheduler.alphas_cumprod.numpy() - 1) / 2
    midpoints = (ln_sigma[1:] + ln_sigma[:-1]) / 2
    shares = np.diff([0.0, *map(NormalDist(-1.2, 1.2).cdf, midpoints), 1.0])
    counts = np.bincount(mixed[1::2], minlength=100)
    often = shares > 1e-4
    chi_squared = ((counts - 100_000 * shares) ** 2 / (100_000 * shares))[often].sum()
    assert abs(chi_squared - often.sum()) < 4 * np.sqrt(2 * often.sum())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            ({"steps": n}, f"steps is {n}; a model with 100 timesteps takes 1 to 100")
            for n in (0, 101)
        ),
        *(({"steps": times}, "must be 2 or more, falling") for times in ([9, 9, -1], [9])),
        ({"steps": [9, -2]}, "at least -1"),
        ({"steps": [100, 9]}, "at most 99"),
        ({"spacing": "leading"}, "spacing is .leading.; it can be trailing or logsnr"),
    ],
)
def test_times_outside_the_schedule_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sampling_times(NoiseScheduler(100), **options)
