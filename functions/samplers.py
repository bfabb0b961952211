"""Reverse processes: from pure noise x_T to an image x_0, with any model of `predict`.

Each sampler is a plain function `f(model, scheduler, x_T, steps=N) -> x_0`:

    ddpm_sample          ancestral: fresh noise in every step corrects the errors of earlier ones; for many steps
    ddim_sample          order 1; deterministic with eta = 0, and `ddpm_sample` with eta = 1
    dpm_solver_sample    DPM-Solver++ 2M, order 2; deterministic with eta = 0, and with eta = 1 its SDE form
    ipndm_sample         iPNDM, up to order 4, deterministic

Their defaults are the papers'; what the scripts choose is in functions/sampling/options.py. They share:

    model        a `Denoiser`, or any callable `(x_t (B, ...), t (B,) int64) -> eps (B, ...)`; called once a step
    x_T          (B, C, H, W) standard normal, any B; sample i depends on x_T[i] and its own step noise alone
    steps        network calls, 1 .. T; None: all T; or the falling timesteps themselves: then x_T is the state at the
                 first, and what is returned that at the last, -1 the clean image
    spacing      which timesteps a number of steps means, "trailing" or "logsnr": see `sampling_times`
    clip_x_0     clip the model's x_0 to [-1, 1] *before* it enters the step, and recompute eps to agree with it:
                 clipping only at the end lets errors in colour build up over the chain
    step_noise   `step_noise(k) -> (B, C, H, W)`, standard normal, called once for each step that adds noise with the
                 number of network calls made before it (0, 1, ...); None: PyTorch's global generator. All else is
                 deterministic. Samplers that add no noise never call it; they take it so that all are called alike.
    on_step      `on_step(k, t, x, x_0)` sees each step's result: x, the state after it, and x_0, the prediction from
                 timestep t that it was made with

They return images (B, C, H, W), in [-1, 1] when `clip_x_0`; `ValueError` says what cannot be had. A step leads from
timestep t to s, and `a_t`, `a_s` are alpha_bar there: Python numbers, so the loops never wait for a device.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from functions.noise_scheduler import NoiseScheduler
from functions.prediction import Model, predict
from functions.timesteps import sampling_times

Steps = int | Sequence[int] | None
StepNoise = Callable[[int], Tensor]
OnStep = Callable[[int, int, Tensor, Tensor], None]


@torch.no_grad()
def ddpm_sample(
    model: Model,
    scheduler: NoiseScheduler,
    x_T: Tensor,
    steps: Steps = None,
    variance: str = "small",
    spacing: str = "trailing",
    clip_x_0: bool = True,
    step_noise: StepNoise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, arXiv:2006.11239, Algorithm 2); weak order 1.

    Algorithm 2 subtracts eps from x_t directly; the same mean is written here through x_0 (Eqs. 15 and 7), because
    that is where clipping belongs. Without clipping the two are identical.

    Args:
        variance: of the step's noise (Section 3.2): "small", the posterior's, as in Ho's face runs; or "large", beta,
            which is as good with all steps and leaves noise in the images with few.
    """
    if variance not in ("small", "large"):
        raise ValueError(f"variance is {variance!r}; it can be small or large")
    x = x_T  # Algorithm 2, line 1; for the scripts drawn by `ImageNoise`
    # Line 2; a step from t to s
    for k, (t, s) in enumerate(pairwise(sampling_times(scheduler, steps, spacing))):
        x_0, _ = predict(model, scheduler, x, t, clip_x_0)  # Eq. 15, in `scheduler.predict_x_0`
        mean, sigma_squared = scheduler.q_posterior(x_0, x, t, s)  # Eq. 7
        if variance == "large":
            sigma_squared = scheduler.step_beta(t, s)
        # Line 3: N(0, I); s = -1 is the paper's t = 1
        z = noise_of(step_noise, k, x) if s >= 0 else 0.0
        x = mean + sigma_squared**0.5 * z  # line 4
        if on_step:
            on_step(k, t, x, x_0)
    return x  # line 6


@torch.no_grad()
def ddim_sample(
    model: Model,
    scheduler: NoiseScheduler,
    x_T: Tensor,
    steps: Steps = None,
    eta: float = 0.0,
    spacing: str = "trailing",
    clip_x_0: bool = True,
    step_noise: StepNoise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """DDIM (Song et al. 2021, arXiv:2010.02502, Eqs. 12 and 16); order 1.

    Args:
        eta: 0 is deterministic; 1 adds the posterior's noise and is `ddpm_sample` with the same steps.
    """
    check_eta(eta)
    x = x_T
    for k, (t, s) in enumerate(pairwise(sampling_times(scheduler, steps, spacing))):
        x_0, eps = predict(model, scheduler, x, t, clip_x_0)
        a_s = scheduler.alpha_bar(s)
        sigma = eta * math.sqrt(scheduler.posterior_variance(t, s))  # Eq. 16
        x = math.sqrt(a_s) * x_0 + math.sqrt(max(1 - a_s - sigma**2, 0)) * eps  # Eq. 12
        if sigma > 0:
            x = x + sigma * noise_of(step_noise, k, x)
        if on_step:
            on_step(k, t, x, x_0)
    return x


@torch.no_grad()
def dpm_solver_sample(
    model: Model,
    scheduler: NoiseScheduler,
    x_T: Tensor,
    steps: Steps = None,
    eta: float = 0.0,
    spacing: str = "trailing",
    clip_x_0: bool = True,
    step_noise: StepNoise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """DPM-Solver++ 2M (Lu et al. 2022, arXiv:2211.01095, Algorithm 2), and its SDE form (Eq. 18); order 2.

    In the paper's symbols x_t = alpha x_0 + sigma eps, lambda = log(alpha / sigma), h is the step of lambda, r the step
    before over this one, and D the x_0 that the step assumes, extrapolated from two. The first step has one only and is
    of order 1, DDIM's. So is the last, if it ends at the clean image, where lambda is infinite, or if there are fewer
    than 15 steps (the authors' `lower_order_final`, for stability).

    Args:
        eta: 0 solves the ODE and is deterministic; 1 solves the SDE, whose fresh noise lets later steps correct the
            errors of earlier ones.
    """
    check_eta(eta)
    times = sampling_times(scheduler, steps, spacing)
    last_is_first_order = times[-1] == -1 or len(times) - 1 < 15
    x, x_0_before, h_before = x_T, None, None
    for k, (t, s) in enumerate(pairwise(times)):
        x_0, _ = predict(model, scheduler, x, t, clip_x_0)
        a_t, a_s = scheduler.alpha_bar(t), scheduler.alpha_bar(s)
        alpha_s, sigma_s, sigma_t = math.sqrt(a_s), math.sqrt(1 - a_s), math.sqrt(1 - a_t)
        h = lambda_of(a_s) - lambda_of(a_t)
        if k == 0 or (s == times[-1] and last_is_first_order):
            D = x_0
        else:
            r = h_before / h
            D = (1 + 1 / (2 * r)) * x_0 - 1 / (2 * r) * x_0_before
        x = sigma_s / sigma_t * math.exp(-eta * h) * x - alpha_s * math.expm1(-(1 + eta) * h) * D
        if eta > 0 and sigma_s > 0:
            x = x + sigma_s * math.sqrt(-math.expm1(-2 * eta * h)) * noise_of(step_noise, k, x)
        x_0_before, h_before = x_0, h
        if on_step:
            on_step(k, t, x, x_0)
    return x


ADAMS_BASHFORTH = (
    (1,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


@torch.no_grad()
def ipndm_sample(
    model: Model,
    scheduler: NoiseScheduler,
    x_T: Tensor,
    steps: Steps = None,
    spacing: str = "trailing",
    clip_x_0: bool = True,
    step_noise: StepNoise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """iPNDM (Zhang and Chen 2023, arXiv:2204.13902; PNDM: Liu et al. 2022, arXiv:2202.09778, Eqs. 9 and 12); order 2.

    It solves DDIM's ODE, dy = eps dsigma with y = x / sqrt(alpha_bar) and sigma = sqrt((1 - alpha_bar) / alpha_bar)
    (Song et al. 2021, Eq. 14), in Adams-Bashforth steps of order 4. The first three look back on less and have orders
    1, 2 and 3, where PNDM spends nine more network calls. The weights are those for equal steps, whatever the steps.
    """
    x, history = x_T, deque(maxlen=4)
    for k, (t, s) in enumerate(pairwise(sampling_times(scheduler, steps, spacing))):
        x_0, eps = predict(model, scheduler, x, t, clip_x_0)
        history.append(eps)
        eps_ahead = sum(
            w * e for w, e in zip(ADAMS_BASHFORTH[len(history) - 1], reversed(history), strict=True)
        )
        a_t, a_s = scheduler.alpha_bar(t), scheduler.alpha_bar(s)
        sigma_t, sigma_s = math.sqrt((1 - a_t) / a_t), math.sqrt((1 - a_s) / a_s)
        x = math.sqrt(a_s) * (x / math.sqrt(a_t) + (sigma_s - sigma_t) * eps_ahead)
        if clip_x_0 and s == -1:
            x = x.clamp(-1, 1)  # the extrapolated eps does not know of the clipping
        if on_step:
            on_step(k, t, x, x_0)
    return x


def lambda_of(alpha_bar: float) -> float:
    """DPM-Solver's log(alpha / sigma); 100 for infinity, at the clean image, as exp(-100) is nothing beside 1."""
    return math.log(alpha_bar / (1 - alpha_bar)) / 2 if alpha_bar < 1 else 100.0


def check_eta(eta: float) -> None:
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; it can be 0 to 1")


def noise_of(step_noise: StepNoise | None, k: int, like: Tensor) -> Tensor:
    """Step k's standard normal noise: the caller's, or PyTorch's."""
    return step_noise(k) if step_noise else torch.randn_like(like)
