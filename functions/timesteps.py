"""Which of the T timesteps a sampler visits.

A way through the noise is a falling list of N + 1 timesteps for N network calls. The model is called at all but the
last, which is where the state ends: -1, the clean image (alpha_bar = 1), or a timestep, whose noise is then left in.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from functions.noise_scheduler import NoiseScheduler

SPACINGS = ("trailing", "logsnr")


class SamplingError(ValueError):
    """A sampler was asked for what the model's schedule, or the method, does not have."""


def sampling_times(
    scheduler: NoiseScheduler,
    steps: int | None = None,
    spacing: str = "trailing",
    start: int | None = None,
    stop: int = -1,
) -> list[int]:
    """`steps` + 1 falling timesteps from `start` to `stop`.

    A `start` below T - 1 begins with an image noised to there only (`NoiseScheduler.q_sample`): the lower, the more of
    the image remains. A `stop` above -1 ends with noise left in, for denoising in parts.

    Args:
        steps: network calls, 1 .. start - stop; None: all of them.
        spacing: "trailing", even in t; or "logsnr", even in log(alpha_bar / (1 - alpha_bar)) as far as whole timesteps
            allow, with the last call at t = 0 if `stop` is -1 (Lu et al. 2022, arXiv:2206.00927, Section 3.3).
        start: timestep of the state that the sampler is handed; None: T - 1, pure noise.
        stop: timestep of the state that it returns; -1 is the clean image.

    Raises:
        SamplingError: what was asked for is not within the schedule.
    """
    timesteps = scheduler.timesteps
    start = timesteps - 1 if start is None else start
    if not -1 <= stop < start < timesteps:
        raise SamplingError(
            f"sampling was to go from t = {start} to {stop}; it can go down from {timesteps - 1} to -1, the clean image"
        )
    most = start - stop
    steps = most if steps is None else steps
    if not 1 <= steps <= most:
        whole = f"a model with {timesteps} timesteps" if most == timesteps else f"going from t = {start} to {stop}"
        raise SamplingError(f"steps is {steps}; {whole} takes 1 to {most}")
    if spacing == "trailing":
        return [*(stop + 1 + t for t in trailing_timesteps(most, steps)), stop]
    if spacing == "logsnr":
        return logsnr_timesteps(scheduler, steps, start, stop)
    raise SamplingError(f"spacing is {spacing!r}; it can be {' or '.join(SPACINGS)}")


def trailing_timesteps(timesteps: int, steps: int) -> list[int]:
    """`steps` evenly spaced timesteps, falling, the first of them T - 1: where x_T is the noise one starts from.

    Other spacings ("leading") start below T - 1 and hand the model an x_T noisier than it expects there
    (Lin et al. 2024, arXiv:2305.08891, Section 3.3).
    """
    if not 1 <= steps <= timesteps:
        raise SamplingError(f"steps is {steps}; a model with {timesteps} timesteps takes 1 to {timesteps}")
    return [round(timesteps - k * timesteps / steps) - 1 for k in range(steps)]


def logsnr_timesteps(scheduler: NoiseScheduler, steps: int, start: int, stop: int) -> list[int]:
    """`steps` + 1 timesteps from `start` to `stop`, evenly spaced in the logarithm of the signal-to-noise ratio."""
    log_snr = torch.logit(scheduler.alphas_cumprod.cpu().double()).numpy()  # falling with t
    # The clean image's is infinite, so the even part ends at t = 0 then.
    points, last = (steps, 0) if stop == -1 else (steps + 1, stop)
    wanted = np.linspace(log_snr[start], log_snr[last], points)
    times = np.interp(wanted, log_snr[::-1], np.arange(len(log_snr))[::-1]).round().astype(int)
    # Near t = 0 the log-SNR changes fast, and several points want the same timestep. Move them up until all differ, and
    # down again from `start` if that went too far; there are enough timesteps, so the second undoes nothing.
    k = np.arange(points)
    times = np.maximum.accumulate((times + k)[::-1])[::-1] - k
    times = np.minimum(times, start - k).tolist()
    return [*times, -1] if stop == -1 else times


def prepare(
    scheduler: NoiseScheduler, x: Tensor, steps: int | None, spacing: str, times: Sequence[int] | None, eps_scale: float
) -> tuple[list[int], Tensor, Tensor]:
    """What all samplers need before their loop, so that in it nothing passes between the host and the device.

    Args:
        x: (B, ...), for B and the device.
        steps, spacing: of `sampling_times`; or else `times`, a list as it makes them.
        eps_scale: only checked.

    Returns:
        The N + 1 times; (N, B) int64 on the device of x, whose row k is the model's t in step k; and (N + 1,) float64
        on the CPU, alpha_bar at the times, 1 for the clean image.

    Raises:
        SamplingError: as of `sampling_times`, or `times` do not fall or leave the schedule, or `eps_scale` is below 1.
    """
    if not eps_scale >= 1:
        raise SamplingError(f"eps_scale is {eps_scale}; it can be 1 (leave eps as it is) or more")
    if times is None:
        times = sampling_times(scheduler, steps, spacing)
    elif steps is not None:
        raise SamplingError("steps and times were both given, and times have a number of steps of their own")
    times = [int(t) for t in times]
    falling = all(after < before for before, after in pairwise(times))
    if len(times) < 2 or not falling or times[0] >= scheduler.timesteps or times[-1] < -1:
        raise SamplingError(
            f"times must be 2 or more, falling, from at most {scheduler.timesteps - 1} to at least -1; not {times}"
        )
    alpha_bar = torch.cat([scheduler.alphas_cumprod.cpu().double(), torch.ones(1, dtype=torch.float64)])
    return times, repeat_times(times[:-1], x), alpha_bar[times]  # -1 takes the 1 at the end


def repeat_times(times: Sequence[int], x: Tensor) -> Tensor:
    """N timesteps as (N, B) int64 on the device of x: one transfer for all steps."""
    return torch.tensor(times, device=x.device).view(-1, 1).repeat(1, len(x))
