"""Which of the T timesteps a sampler visits, and which a training draws."""

from collections.abc import Sequence

import torch
from torch import Tensor

from functions.noise_scheduler import NoiseScheduler

SPACINGS = ("trailing", "logsnr")

# The number of steps, or the timesteps themselves; None means all.
Steps = int | Sequence[int] | None


def sampling_times(
    scheduler: NoiseScheduler, steps: Steps = None, spacing: str = "trailing"
) -> list[int]:
    """Return the falling timesteps that a sampler visits.

    They lead from T - 1 to -1, the clean image, where no network is called.

    Args:
        steps: network calls, 1 .. T; None means all T. Or the timesteps themselves, which are
            checked: they may begin below T - 1, with an image that was noised up to there only, and
            end above -1, with noise left in the image.
        spacing: "trailing" is even in t, and the first timestep is T - 1 (Lin et al. 2024,
            arXiv:2305.08891, Section 3.3). "logsnr" is even in log(alpha_bar / (1 - alpha_bar)), as
            far as whole timesteps allow, and the last call is at t = 0 (Lu et al. 2022,
            arXiv:2206.00927, Section 3.3).

    Raises:
        ValueError: when the schedule does not have what was asked for.
    """
    T = scheduler.timesteps
    if spacing not in SPACINGS:
        raise ValueError(f"spacing is {spacing!r}; it can be {' or '.join(SPACINGS)}")
    if steps is None:
        steps = T
    if not isinstance(steps, int):
        times = [int(t) for t in steps]
        falling = times == sorted(set(times), reverse=True)
        if len(times) < 2 or not falling or times[0] >= T or times[-1] < -1:
            raise ValueError(
                f"times must be 2 or more, falling, from at most {T - 1} to at least -1; "
                f"not {times}"
            )
        return times

    if not 1 <= steps <= T:
        raise ValueError(f"steps is {steps}; a model with {T} timesteps takes 1 to {T}")
    if spacing == "trailing":
        return [round(T - k * T / steps) - 1 for k in range(steps + 1)]
    return [*logsnr_timesteps(scheduler, steps, T - 1, 0), -1]


def logsnr_timesteps(scheduler: NoiseScheduler, count: int, first: int, last: int) -> list[int]:
    """Return `count` timesteps from `first` down to `last`, evenly spaced in the log-SNR.

    That is the logarithm of the signal-to-noise ratio, log(alpha_bar / (1 - alpha_bar)).
    """
    ends = torch.logit(scheduler.alphas_cumprod[[first, last]]).tolist()
    log_snr = torch.linspace(*ends, count, dtype=torch.float64)
    times = nearest_timesteps(scheduler, log_snr)

    # Near t = 0 the log-SNR changes fast, and several points get the same timestep. They move up
    # until all differ. With k added, "falling by 1 or more" becomes "not rising", and the running
    # maximum from the last one back to the first makes it so.
    k = torch.arange(count)
    from_last = (times + k).flip(0)
    times = from_last.cummax(0).values.flip(0) - k

    # Where that went too far, they move down again to what falls by 1 each from `first`. There are
    # enough timesteps for both, so all still differ.
    return torch.minimum(times, first - k).tolist()


def mixed_timesteps(scheduler: NoiseScheduler, uniform: Tensor, normal: Tensor) -> Tensor:
    """Replace every second of (B,) uniform timesteps by one whose noise is log-normal.

    The noise is that beside an image of size 1, sigma = sqrt((1 - alpha_bar) / alpha_bar), and
    ln sigma is from N(-1.2, 1.2^2). This is the distribution of EDM (Karras et al. 2022,
    arXiv:2206.00364, Table 1): most steps go where there is most to learn. `normal` is (B,)
    standard normal.
    """
    log_sigma = 1.2 * normal - 1.2
    log_normal = nearest_timesteps(scheduler, -2 * log_sigma)
    mixed = uniform.clone()
    mixed[1::2] = log_normal[1::2]
    return mixed


def nearest_timesteps(scheduler: NoiseScheduler, log_snr: Tensor) -> Tensor:
    """Return the timesteps (B,) whose log-SNR is nearest to log_snr (B,)."""
    t = torch.arange(scheduler.timesteps, device=log_snr.device)
    # The negative log-SNR rises with t, as `searchsorted` wants it.
    noisiness = -torch.logit(scheduler.alpha_bar(t))  # (T,)
    between = (noisiness[1:] + noisiness[:-1]) / 2
    nearest = torch.searchsorted(between, -log_snr.to(between))
    return nearest.to(log_snr.device)
