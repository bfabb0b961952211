"""The timesteps that a sampler visits."""

from collections.abc import Sequence

import torch

from functions.noise_scheduler import NoiseScheduler

SPACINGS = ("trailing", "logsnr")

# The number of steps, or the timesteps themselves. None means T steps.
Steps = int | Sequence[int] | None


def sampling_times(
    scheduler: NoiseScheduler, steps: Steps = None, spacing: str = "trailing"
) -> list[int]:
    """Return the timesteps that a sampler visits, in descending order.

    N network calls visit N + 1 timesteps, from T - 1 down to -1. The last one, -1, is the clean
    image, where the network is not called.

    Args:
        steps: the number of network calls, 1 .. T (None means T); or the timesteps themselves,
            which may start below T - 1, for an image that was noised only up to that timestep, and
            end above -1, to leave noise in the image.
        spacing: "trailing" timesteps are evenly spaced in t (Lin et al. 2024, arXiv:2305.08891,
            Section 3.3). "logsnr" timesteps are evenly spaced in log-SNR, which is
            log(alpha_bar / (1 - alpha_bar)), up to rounding, from T - 1 to 0, followed by -1 (Lu et
            al. 2022, arXiv:2206.00927, Section 3.3).

    Raises ValueError for too many or too few steps.
    """
    T = scheduler.timesteps
    if steps is None:
        steps = T
    if not isinstance(steps, int):
        return list(steps)

    if not 1 <= steps <= T:
        raise ValueError(f"steps is {steps}; a model with {T} timesteps takes 1 to {T}")
    if spacing == "trailing":
        return [round(T - k * T / steps) - 1 for k in range(steps + 1)]
    return [*logsnr_timesteps(scheduler, steps, T - 1, 0), -1]


def logsnr_timesteps(scheduler: NoiseScheduler, count: int, first: int, last: int) -> list[int]:
    """Return `count` different timesteps from `first` down to `last`, evenly spaced in log-SNR."""
    # `searchsorted` needs rising values. The negative log-SNR rises with t.
    negative_log_snr = -torch.logit(scheduler.alphas_cumprod)  # (T,)
    ends = negative_log_snr[[first, last]].tolist()
    points = torch.linspace(*ends, count, dtype=torch.float64)
    # The nearest timestep of each point is the one between whose midpoints it lies.
    midpoints = (negative_log_snr[1:] + negative_log_snr[:-1]) / 2
    times = torch.searchsorted(midpoints, points)

    # Near t = 0 the log-SNR changes fast, so several points have the same nearest timestep. Equal
    # timesteps are raised until each is at least 1 above the next. This holds if times + k never
    # rises with k, which a running maximum from the last element to the first ensures.
    k = torch.arange(count)
    from_last = (times + k).flip(0)
    times = from_last.cummax(0).values.flip(0) - k

    # Raising can push timesteps above first - k, or even above `first`. The minimum lowers these
    # again, and all timesteps still differ.
    return torch.minimum(times, first - k).tolist()
