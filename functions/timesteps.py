"""Which of the T timesteps a sampler visits.

A way through the noise is a falling list of N + 1 timesteps for N network calls. The model is called at all but the
last, which is where the state ends: -1, the clean image (alpha_bar = 1), or a timestep, whose noise is then left in.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch

from functions.noise_scheduler import NoiseScheduler

SPACINGS = ("trailing", "logsnr")


def sampling_times(
    scheduler: NoiseScheduler,
    steps: int | Sequence[int] | None = None,
    spacing: str = "trailing",
    start: int | None = None,
    stop: int = -1,
) -> list[int]:
    """The falling timesteps from `start` to `stop` that a sampler visits: one more than it calls the network.

    A `start` below T - 1 begins with an image noised to there only (`NoiseScheduler.q_sample`): the lower, the more of
    the image remains. A `stop` above -1 ends with noise left in, for denoising in parts.

    Args:
        steps: network calls, 1 .. start - stop; None: all of them; or the timesteps themselves, which are checked.
        spacing: "trailing", even in t; or "logsnr", even in log(alpha_bar / (1 - alpha_bar)) as far as whole timesteps
            allow, with the last call at t = 0 if `stop` is -1 (Lu et al. 2022, arXiv:2206.00927, Section 3.3).
        start: timestep of the state that the sampler is handed; None: T - 1, pure noise.
        stop: timestep of the state that it returns; -1 is the clean image.

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
    start = timesteps - 1 if start is None else start
    if not -1 <= stop < start < timesteps:
        raise ValueError(
            f"sampling was to go from t = {start} to {stop}; it can go down from {timesteps - 1} to -1, the clean image"
        )
    most = start - stop
    steps = most if steps is None else steps
    if not 1 <= steps <= most:
        whole = f"a model with {timesteps} timesteps" if most == timesteps else f"going from t = {start} to {stop}"
        raise ValueError(f"steps is {steps}; {whole} takes 1 to {most}")
    if spacing == "trailing":
        return [*(stop + 1 + t for t in trailing_timesteps(most, steps)), stop]
    return logsnr_timesteps(scheduler, steps, start, stop)


def trailing_timesteps(timesteps: int, steps: int) -> list[int]:
    """`steps` evenly spaced timesteps, falling, the first of them T - 1: where x_T is the noise one starts from.

    Other spacings ("leading") start below T - 1 and hand the model an x_T noisier than it expects there
    (Lin et al. 2024, arXiv:2305.08891, Section 3.3).
    """
    return [round(timesteps - k * timesteps / steps) - 1 for k in range(steps)]


def logsnr_timesteps(scheduler: NoiseScheduler, steps: int, start: int, stop: int) -> list[int]:
    """`steps` + 1 timesteps from `start` to `stop`, evenly spaced in the logarithm of the signal-to-noise ratio."""
    noisiness = -torch.logit(scheduler.alphas_cumprod)  # minus the log-SNR: (T,), rising with t
    # The clean image's is infinite, so the even part ends at t = 0 then.
    points, last = (steps, 0) if stop == -1 else (steps + 1, stop)
    wanted = torch.linspace(noisiness[start].item(), noisiness[last].item(), points, dtype=torch.float64)
    between = (noisiness[1:] + noisiness[:-1]) / 2
    times = torch.searchsorted(between, wanted)  # the nearest timestep
    # Near t = 0 the log-SNR changes fast, and several points want the same timestep. Move them up until all differ, and
    # down again from `start` if that went too far; there are enough timesteps, so the second undoes nothing.
    k = torch.arange(points)
    times = (times + k).flip(0).cummax(0).values.flip(0) - k
    times = torch.minimum(times, start - k).tolist()
    return [*times, -1] if stop == -1 else times
