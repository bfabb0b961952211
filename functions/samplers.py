"""Reverse processes: from pure noise x_T to an image x_0, with any model of `predict`.

Each sampler is a plain function `f(model, scheduler, x_T, steps=N) -> x_0`, whose defaults are the
papers'. The table `SAMPLERS`, at the end, has them by name, with what the scripts choose. A new
sampler is a function and a row there. All samplers share these arguments:

    model        a `Denoiser`, or any callable `(x_t (B, ...), t (B,) int64) -> eps (B, ...)`. It is
                 called once a step.
    x_T          (B, C, H, W) standard normal, with any B. Sample i depends on x_T[i] and its own
                 step noise alone.
    steps        the number of network calls, 1 .. T; None means all T. Or the falling timesteps
                 themselves: then x_T is the state at the first, and the result is the state at the
                 last, where -1 means the clean image.
    spacing      which timesteps a number of steps means, "trailing" or "logsnr"; see
                 `sampling_times`.
    clip_x_0     clip the model's x_0 to [-1, 1] *before* it enters the step, and recompute eps to
                 agree with it. Clipping only at the end lets errors in colour build up over the
                 chain.
    step_noise   `step_noise(k) -> (B, C, H, W)`, standard normal. It is called once for each step
                 that adds noise, with the number of network calls before it (0, 1, ...). None means
                 PyTorch's global generator. All else is deterministic. Samplers that add no noise
                 take it, too, so that all are called alike.
    on_step      `on_step(k, t, x, x_0)` is called with each step's result: x is the state after the
                 step, and x_0 the prediction from timestep t that it was made with.

The result is images (B, C, H, W), in [-1, 1] when `clip_x_0`. Arguments that cannot be had raise
ValueError. A step leads from timestep t to s, and `a_t` and `a_s` are alpha_bar there. They are
Python numbers, so the loops never wait for a device.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from functions.noise_scheduler import NoiseScheduler
from functions.prediction import Model, predict
from functions.timesteps import Steps, sampling_times

# Those of the noise that `ddpm_sample` adds.
VARIANCES = ("small", "large")
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
    """Sample ancestrally (Ho et al. 2020, arXiv:2006.11239, Algorithm 2); weak order 1.

    Fresh noise in every step corrects the errors of earlier ones.

    Args:
        variance: that of the step's noise (Section 3.2). "small" is the posterior's, as in Ho's
            face runs. "large" is beta, which is as good with all steps and leaves noise in the
            images with few.
    """
    if variance not in VARIANCES:
        raise ValueError(f"variance is {variance!r}; it can be small or large")
    times = sampling_times(scheduler, steps, spacing)

    # Line 1: x_T ~ N(0, I), which the caller draws.
    x = x_T
    # Line 2: for t = T, ..., 1. A step leads from t to s.
    for k, (t, s) in enumerate(pairwise(times)):
        # Algorithm 2 subtracts eps from x_t directly. The same mean is computed here by way of x_0
        # (Eq. 15, then Eq. 7), because that is where clipping belongs. Without clipping the two are
        # identical.
        x_0, _ = predict(model, scheduler, x, t, clip_x_0)
        mean, sigma_squared = scheduler.q_posterior(x_0, x, t, s)
        if variance == "large":
            sigma_squared = scheduler.step_beta(t, s)

        # Line 3: z ~ N(0, I), but no noise in the last step, to the clean image.
        z = noise_of(step_noise, k, x) if s >= 0 else 0.0
        # Line 4: x_{t-1} = mean + sigma_t z.
        x = mean + sigma_squared**0.5 * z
        if on_step:
            on_step(k, t, x, x_0)
    # Line 6: return x_0.
    return x


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
    """Sample by DDIM (Song et al. 2021, arXiv:2010.02502); order 1.

    Args:
        eta: 0 is deterministic. 1 adds the posterior's noise and is `ddpm_sample` with the same
            steps.
    """
    check_eta(eta)
    times = sampling_times(scheduler, steps, spacing)
    x = x_T
    for k, (t, s) in enumerate(pairwise(times)):
        x_0, eps = predict(model, scheduler, x, t, clip_x_0)
        a_s = scheduler.alpha_bar(s)
        # Eq. 16 makes sigma the posterior's times eta.
        sigma = eta * math.sqrt(scheduler.posterior_variance(t, s))
        # Eq. 12 splits the variance 1 - a_s: sigma^2 is that of fresh noise, and eps gets the rest,
        # which rounding may bring just below 0.
        x = math.sqrt(a_s) * x_0 + math.sqrt(max(1 - a_s - sigma**2, 0)) * eps
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
    """Sample by DPM-Solver++ 2M or its SDE form (Lu et al. 2022, arXiv:2211.01095); order 2.

    The two are Algorithm 2 and Eq. 18. In the paper's symbols x_t = alpha x_0 + sigma eps and
    lambda = log(alpha / sigma).

    Args:
        eta: 0 solves the ODE and is deterministic. 1 solves the SDE, whose fresh noise lets later
            steps correct the errors of earlier ones.
    """
    check_eta(eta)
    times = sampling_times(scheduler, steps, spacing)
    # The last step is of order 1 if it ends at the clean image, where lambda is infinite. It is so,
    # too, if there are fewer than 15 steps: the authors' `lower_order_final`, for stability.
    last_is_first_order = times[-1] == -1 or len(times) - 1 < 15

    x = x_T
    x_0_before = h_before = None
    for k, (t, s) in enumerate(pairwise(times)):
        x_0, _ = predict(model, scheduler, x, t, clip_x_0)
        a_t = scheduler.alpha_bar(t)
        a_s = scheduler.alpha_bar(s)
        alpha_s = math.sqrt(a_s)
        sigma_s = math.sqrt(1 - a_s)
        sigma_t = math.sqrt(1 - a_t)
        # h is the step of lambda, and r below is the step before over this one.
        h = half_log_snr(a_s) - half_log_snr(a_t)

        # D is the x_0 that the step assumes. In order 2 it is extrapolated from two predictions.
        # The first step has only one, so it is of order 1; with eta = 0 it is DDIM's.
        if k == 0 or (s == times[-1] and last_is_first_order):
            D = x_0
        else:
            r = h_before / h
            D = (1 + 1 / (2 * r)) * x_0 - 1 / (2 * r) * x_0_before
        x = sigma_s / sigma_t * math.exp(-eta * h) * x - alpha_s * math.expm1(-(1 + eta) * h) * D

        if eta > 0 and sigma_s > 0:
            x = x + sigma_s * math.sqrt(-math.expm1(-2 * eta * h)) * noise_of(step_noise, k, x)
        x_0_before = x_0
        h_before = h
        if on_step:
            on_step(k, t, x, x_0)
    return x


# Each row has the weights of one order, 1 to 4: of the newest eps, the one before it, and so on.
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
    """Sample by iPNDM (Zhang and Chen 2023, arXiv:2204.13902); order 2.

    It solves DDIM's ODE, dy = eps dsigma with y = x / sqrt(alpha_bar) and
    sigma = sqrt((1 - alpha_bar) / alpha_bar) (Song et al. 2021, Eq. 14), in Adams-Bashforth steps
    of order 4 (PNDM: Liu et al. 2022, arXiv:2202.09778, Eqs. 9 and 12). The first three steps look
    back on less and have weights of orders 1, 2 and 3, where PNDM spends nine more network calls.
    The weights are those for equal steps of sigma, whatever the steps are. They are not equal, so
    the order that is measured is about 2 (tests/functions/test_sampler_orders.py).
    """
    times = sampling_times(scheduler, steps, spacing)
    x = x_T
    history = []
    for k, (t, s) in enumerate(pairwise(times)):
        x_0, eps = predict(model, scheduler, x, t, clip_x_0)
        # At most four eps are kept, the newest first.
        history = [eps, *history[:3]]
        weights = ADAMS_BASHFORTH[len(history) - 1]
        eps_ahead = sum(w * e for w, e in zip(weights, history, strict=True))

        a_t = scheduler.alpha_bar(t)
        a_s = scheduler.alpha_bar(s)
        sigma_t = math.sqrt((1 - a_t) / a_t)
        sigma_s = math.sqrt((1 - a_s) / a_s)
        # This is a step of dy = eps dsigma, where y = x / sqrt(alpha_bar).
        x = math.sqrt(a_s) * (x / math.sqrt(a_t) + (sigma_s - sigma_t) * eps_ahead)
        # The extrapolated eps does not agree with a clipped x_0, so the image itself is clipped.
        if clip_x_0 and s == -1:
            x = x.clamp(-1, 1)
        if on_step:
            on_step(k, t, x, x_0)
    return x


def half_log_snr(alpha_bar: float) -> float:
    """Return DPM-Solver's lambda = log(alpha / sigma)."""
    # At the clean image it is infinite. 100 stands for that, as exp(-100) is nothing beside 1.
    return math.log(alpha_bar / (1 - alpha_bar)) / 2 if alpha_bar < 1 else 100.0


def check_eta(eta: float) -> None:
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; it can be 0 to 1")


def noise_of(step_noise: StepNoise | None, k: int, like: Tensor) -> Tensor:
    """Return step k's standard normal noise: the caller's, or PyTorch's."""
    return step_noise(k) if step_noise else torch.randn_like(like)


@dataclass(frozen=True)
class Sampler:
    """A row of `SAMPLERS`: a sampler as the scripts offer it."""

    function: Callable[..., Tensor]
    # The spacing, and the options that other samplers lack, with the scripts' defaults.
    options: dict[str, str | float]
    # What it is, in the help of --sampler.
    help: str


SAMPLERS = {
    "ddpm": Sampler(
        ddpm_sample,
        {"spacing": "trailing", "variance": "small"},
        "the paper's, with fresh noise in every step",
    ),
    "ddim": Sampler(ddim_sample, {"spacing": "trailing", "eta": 0.0}, "deterministic"),
    # The paper's eta is 0. The scripts take fresh noise, which lets later steps correct the errors
    # of earlier ones: with 20 calls the distance is the lowest with every objective. With a network
    # of `faces-v` this is the better spacing (both: docs/whole-before-detail.md).
    "dpm++": Sampler(
        dpm_solver_sample,
        {"spacing": "logsnr", "eta": 1.0},
        "DPM-Solver++ 2M, good with 20 steps",
    ),
    "ipndm": Sampler(ipndm_sample, {"spacing": "trailing"}, "deterministic, of order 2"),
}
