"""Which of the T timesteps a sampler visits, and which a training draws."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

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

    Raises ValueError when what was asked for is not within the schedule.
    """
    T = scheduler.timesteps
    if spacing not in SPACINGS:
        raise ValueError(f"spacing is {spacing!r}; it can be {' or '.join(SPACINGS)}")
    if steps is not None and not isinstance(steps, int):
        times = [int(t) for t in steps]
        falling = all(after < before for before, after in pairwise(times))
        if len(times) < 2 or not falling or times[0] >= T or times[-1] < -1:
            raise ValueError(
                f"times must be 2 or more, falling, from at most {T - 1} to at least -1; not {times}"
            )
        return times
    steps = T if steps is None else steps
    if not 1 <= steps <= T:
        raise ValueError(f"steps is {steps}; a model with {T} timesteps takes 1 to {T}")
    if spacing == "trailing":
        return [round(T - k * T / steps) - 1 for k in range(steps + 1)]
    return [*logsnr_timesteps(scheduler, steps, T - 1, 0), -1]


def logsnr_timesteps(scheduler: NoiseScheduler, count: int, first: int, last: int) -> list[int]:
    """`count` timesteps from `first` down to `last`, evenly spaced in the logarithm of the signal-to-noise ratio."""
    ends = torch.logit(scheduler.alphas_cumprod[[first, last]]).tolist()
    times = nearest_timesteps(scheduler, torch.linspace(*ends, count, dtype=torch.float64))
    # Near t = 0 the log-SNR changes fast, and several points want the same timestep. Move them up until all differ, and
    # down again from the first if that went too far; there are enough timesteps, so the second undoes nothing.
    k = torch.arange(count)
    times = (times + k).flip(0).cummax(0).values.flip(0) - k
    return torch.minimum(times, first - k).tolist()


def mixed_timesteps(scheduler: NoiseScheduler, uniform: Tensor, normal: Tensor) -> Tensor:
    """Replace every second of (B,) uniform timesteps by the one nearest to sigma, ln sigma from N(-1.2, 1.2^2).

    sigma = sqrt((1 - alpha_bar) / alpha_bar) is the noise beside an image of size 1, and the distribution that of EDM
    (Karras et al. 2022, arXiv:2206.00364, Table 1): most steps go where there is most to learn. `normal` is (B,)
    standard normal.
    """
    of_sigma = nearest_timesteps(scheduler, -2 * (1.2 * normal - 1.2))
    return torch.where(
        torch.arange(len(uniform), device=uniform.device) % 2 == 1, of_sigma, uniform
    )


def nearest_timesteps(scheduler: NoiseScheduler, log_snr: Tensor) -> Tensor:
    """The timesteps whose log(alpha_bar / (1 - alpha_bar)) is nearest to these (B,)."""
    t = torch.arange(scheduler.timesteps, device=log_snr.device)
    noisiness = -torch.logit(scheduler.alpha_bar(t))  # (T,), rising with t
    between = (noisiness[1:] + noisiness[:-1]) / 2
    return torch.searchsorted(between, -log_snr.to(between)).to(log_snr.device)
