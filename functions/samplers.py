"""Reverse processes: from pure noise x_T to an image x_0, with any noise-predicting model.

Each sampler is a plain function `f(model, scheduler, x_T, ...) -> x_0`. `model` is any callable
`(x_t (B, C, H, W), t (B,) int64) -> eps (B, C, H, W)`. Randomness comes from the caller: x_T, and
`step_noise(k) -> (B, C, H, W)`, standard normal, called once for each step that adds noise with the number of network
calls made before it (0, 1, ...); without it noise is drawn from PyTorch's global generator. All else is deterministic.

With `clip_x_0` the model's x_0 is clipped to [-1, 1] *before* it enters the step, and eps recomputed to agree with it:
clipping only at the end lets errors in colour build up over the chain.

`on_step(k, t, x, x_0)` sees each step's result: x, the state after it, and x_0, the prediction it was made with.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from functions.noise_scheduler import NoiseScheduler

Model = Callable[[Tensor, Tensor], Tensor]
StepNoise = Callable[[int], Tensor]
OnStep = Callable[[int, int, Tensor, Tensor], None]


class SamplingError(ValueError):
    """A sampler was asked for what the model's schedule does not have."""


@torch.no_grad()
def ddpm_sample(
    model: Model,
    scheduler: NoiseScheduler,
    x_T: Tensor,
    clip_x_0: bool = True,
    step_noise: StepNoise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Ancestral sampling over all T steps (Ho et al. 2020, Algorithm 2), with the posterior's variance of Eq. 7.

    Algorithm 2 subtracts eps from x_t directly; the same mean is written here through x_0 (Eqs. 15 and 7), because
    that is where clipping belongs. Without clipping the two are identical.

    Args:
        x_T: (B, C, H, W) standard normal noise.

    Returns:
        (B, C, H, W) images; in [-1, 1] when `clip_x_0`.
    """
    x = x_T
    for k, t in enumerate(reversed(range(scheduler.timesteps))):
        t_batch = torch.full((len(x),), t, device=x.device)
        x_0 = scheduler.predict_x_0(x, t_batch, model(x, t_batch))
        if clip_x_0:
            x_0 = x_0.clamp(-1, 1)
        mean, variance = scheduler.q_posterior(x_0, x, t_batch)
        x = mean if t == 0 else mean + variance.sqrt() * draw(step_noise, k, x)
        if on_step:
            on_step(k, t, x, x_0)
    return x


@torch.no_grad()
def ddim_sample(
    model: Model,
    scheduler: NoiseScheduler,
    x_T: Tensor,
    steps: int,
    eta: float = 0.0,
    clip_x_0: bool = True,
    step_noise: StepNoise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """DDIM (Song et al. 2021, arXiv:2010.02502, Eqs. 12 and 16) over `steps` of the T timesteps.

    Args:
        x_T: (B, C, H, W) standard normal noise.
        steps: network calls, 1 .. T (`SamplingError` otherwise).
        eta: 0 is deterministic; 1 adds the posterior's noise, which with steps = T is `ddpm_sample`.

    Returns:
        (B, C, H, W) images; in [-1, 1] when `clip_x_0`.
    """
    x = x_T
    times = trailing_timesteps(scheduler.timesteps, steps)
    alpha_bars = [*scheduler.alphas_cumprod[times].tolist(), 1.0]  # 1: after the last step no noise is left
    for k, t in enumerate(times):
        alpha_bar, alpha_bar_next = alpha_bars[k], alpha_bars[k + 1]
        t_batch = torch.full((len(x),), t, device=x.device)
        eps = model(x, t_batch)
        x_0 = scheduler.predict_x_0(x, t_batch, eps)
        if clip_x_0:
            x_0 = x_0.clamp(-1, 1)
            eps = scheduler.predict_eps(x, t_batch, x_0)
        variance = eta**2 * (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)  # Eq. 16
        x = alpha_bar_next**0.5 * x_0 + (1 - alpha_bar_next - variance) ** 0.5 * eps  # Eq. 12
        if variance > 0:
            x = x + variance**0.5 * draw(step_noise, k, x)
        if on_step:
            on_step(k, t, x, x_0)
    return x


def trailing_timesteps(timesteps: int, steps: int) -> list[int]:
    """`steps` evenly spaced timesteps, falling, the first of them T - 1: where x_T is the noise one starts from.

    Other spacings ("leading") start below T - 1 and hand the model an x_T noisier than it expects there
    (Lin et al. 2024, arXiv:2305.08891, Section 3.3).
    """
    if not 1 <= steps <= timesteps:
        raise SamplingError(f"steps is {steps}; a model with {timesteps} timesteps takes 1 to {timesteps}")
    return [round(timesteps - k * timesteps / steps) - 1 for k in range(steps)]


def draw(step_noise: StepNoise | None, k: int, like: Tensor) -> Tensor:
    """Step k's standard normal noise: the caller's, or PyTorch's."""
    return step_noise(k) if step_noise else torch.randn_like(like)
