"""The timesteps that a sampler visits."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from functions.noise_scheduler import NoiseScheduler

# The number of steps, or the timesteps themselves. None means T steps.
Steps = int | Sequence[int] | None
# Below this log-SNR there is more than 90 times as much noise as image, and x_0 hardly changes.
# With -7 instead, samples without fresh noise would lose 14% of the details that vary most.
FIRST_LOG_SNR = -9.0
# If the log-SNR at T - 1 is above this, the even steps begin at T - 1. That of linear betas is
# -10.1: there a network of eps needs its calls, and without them samples of `faces` got worse.
FAR_LOG_SNR = -12.0


def sampling_times(scheduler: NoiseScheduler, steps: Steps, spacing: str = "trailing") -> list[int]:
    """Return the timesteps that a sampler visits: for N network calls N + 1, from T - 1 down to -1.

    The last one, -1, is the clean image, where the network is not called.

    Args:
        steps: the number of network calls, 1 .. T (None means T); or the timesteps themselves,
            which may start below T - 1, for an image that was noised only up to there, and end
            above -1, to leave noise in the image.
        spacing: a key of SPACINGS.

    Raises ValueError for another number of steps, and for another spacing.
    """
    T = scheduler.timesteps
    if steps is None:
        steps = T
    if isinstance(steps, Iterable):
        return list(steps)

    if steps not in range(1, T + 1):
        raise ValueError(f"steps is {steps}; a model with {T} timesteps takes 1 to {T}")
    if spacing not in SPACINGS:
        raise ValueError(f"spacing is {spacing!r}; it can be {' or '.join(SPACINGS)}")
    return SPACINGS[spacing](scheduler, int(steps))


def trailing(scheduler: NoiseScheduler, steps: int) -> list[int]:
    """Space them evenly in t (Lin et al. 2024, arXiv:2305.08891, Section 3.3)."""
    T = scheduler.timesteps
    return [round(T - k * T / steps) - 1 for k in range(steps + 1)]


def logsnr(scheduler: NoiseScheduler, steps: int) -> list[int]:
    """Space them evenly in log-SNR down to 0, then -1 (Lu et al. 2022, arXiv:2206.00927, 3.3).

    They begin at T - 1. If that is far below FIRST_LOG_SNR, the second step is there, and those
    after it are even. Fewer than four steps are even in t. In the log-SNR they would be only at
    both ends, where there is nothing but noise, or hardly any.
    """
    if steps < 4:
        return trailing(scheduler, steps)
    first, last = torch.logit(scheduler.alphas_cumprod[[-1, 0]]).tolist()
    if first > FAR_LOG_SNR:
        log_snr = torch.linspace(first, last, steps, dtype=torch.float64)
    else:
        even = torch.linspace(FIRST_LOG_SNR, last, steps - 1, dtype=torch.float64)
        log_snr = torch.cat([even.new_tensor([first]), even])
    return [*nearest_timesteps(scheduler, log_snr), -1]


# The values of --spacing: each (scheduler, steps) -> steps + 1 timesteps, from T - 1 down to -1.
SPACINGS = {"trailing": trailing, "logsnr": logsnr}


def nearest_timesteps(scheduler: NoiseScheduler, log_snr: Tensor) -> list[int]:
    """Return different timesteps, in descending order, near rising values of the log-SNR.

    `log_snr` has at most T values of log(alpha_bar / (1 - alpha_bar)): (count,) float64.
    """
    # `searchsorted` needs rising values. The negative log-SNR rises with t.
    negative_log_snr = -torch.logit(scheduler.alphas_cumprod)  # (T,)
    # The nearest timestep of each point is the one between whose midpoints it lies.
    midpoints = (negative_log_snr[1:] + negative_log_snr[:-1]) / 2
    times = torch.searchsorted(midpoints, -log_snr)
    first = times[0]

    # Near t = 0 the log-SNR changes fast, so several points have the same nearest timestep. Equal
    # timesteps are raised until each is at least 1 above the next. This holds if times + k never
    # rises with k, which a running maximum from the last element to the first ensures.
    k = torch.arange(len(log_snr))
    from_last = (times + k).flip(0)
    times = from_last.cummax(0).values.flip(0) - k

    # Raising can push timesteps above first - k, or even above `first`. The minimum lowers these
    # again, and all timesteps still differ.
    return torch.minimum(times, first - k).tolist()
