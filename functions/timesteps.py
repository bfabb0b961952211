"""Which of the T timesteps a sampler visits."""

from collections.abc import Sequence
from itertools import pairwise

import torch

from functions.noise_scheduler import NoiseScheduler

SPACINGS = ("trailing", "logsnr")


def sampling_times(
    scheduler: NoiseScheduler, steps: int | Sequence[int] | None = None, spacing: str = "trailing"
) -> list[int]:
    """The falling timesteps that a sampler visits, from T - 1 to -1, the clean image, where no network is called.

    Args:
        steps: network calls, 1 .. T; None: all T; or the timesteps themselves, which are checked: they may begin below
            T - 1, with an image noised to there only, and end above -1, with noise left in.
        spacing: "trailing", even in t, the first of them T - 1 (Lin et al. 2024, arXiv:2305.08891, Section 3.3); or
            "logsnr", even in log(alpha_bar / (1 - alpha_bar)) as far as whole timesteps allow, with the last call at
            t = 0 (Lu et al. 2022, arXiv:2206.00927, Section 3.3).

    Raises:
        ValueError: what was asked for is not within the schedule.
    """
    timesteps = scheduler.timesteps
    if spacing not in SPACINGS:
        raise ValueError(f"spacing is {spacing!r}; it can be {' or '.join(SPACINGS)}")
    if steps is not None and not isinstance(steps, int):
        times = [int(t) for t in steps]
        falling = all(after < before for before, after in pairwise(times))
        if len(times) < 2 or not falling or times[0] >= timesteps or times[-1] < -1:
            raise ValueError(
                f"times must be 2 or more, falling, from at most {timesteps - 1} to at least -1; not {times}"
            )
        return times
    steps = timesteps if steps is None else steps
    if not 1 <= steps <= timesteps:
        raise ValueError(f"steps is {steps}; a model with {timesteps} timesteps takes 1 to {timesteps}")
    if spacing == "trailing":
        return [round(timesteps - k * timesteps / steps) - 1 for k in range(steps + 1)]
    return [*logsnr_timesteps(scheduler, steps, timesteps - 1, 0), -1]


def logsnr_timesteps(scheduler: NoiseScheduler, count: int, first: int, last: int) -> list[int]:
    """`count` timesteps from `first` down to `last`, evenly spaced in the logarithm of the signal-to-noise ratio."""
    noisiness = -torch.logit(scheduler.alphas_cumprod)  # minus the log-SNR: (T,), rising with t
    wanted = torch.linspace(noisiness[first].item(), noisiness[last].item(), count, dtype=torch.float64)
    between = (noisiness[1:] + noisiness[:-1]) / 2
    times = torch.searchsorted(between, wanted)  # the nearest timestep
    # Near t = 0 the log-SNR changes fast, and several points want the same timestep. Move them up until all differ, and
    # down again from the first if that went too far; there are enough timesteps, so the second undoes nothing.
    k = torch.arange(count)
    times = (times + k).flip(0).cummax(0).values.flip(0) - k
    return torch.minimum(times, first - k).tolist()
