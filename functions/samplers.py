"""The samplers: from noise x_T to images x_0.

Each sampler is a plain function `f(denoiser, x_T, steps=N) -> x_0` with its paper's defaults. A new
sampler is a function and a row of `SAMPLERS` at the end of this file. All share these arguments:

    denoiser     a `Denoiser`, or anything else with `scheduler` and `predict`, which returns x_0
                 and eps at (x_t, t) and is called once a step
    x_T          (B, C, H, W) standard normal. Sample i depends only on x_T[i] and its step noise.
    steps        the number of network calls, 1 .. T (None means T); or the timesteps themselves,
                 in descending order. Then x_T is the state at the first timestep, and the result
                 is the state at the last one, where -1 means the clean image.
    spacing      "trailing" spaces the timesteps evenly in t, "logsnr" in the log-SNR; a key of
                 SPACINGS in functions/timesteps.py.
    clip_x_0     clip the model's x_0 to [-1, 1] *before* the step uses it. Otherwise errors in
                 colour would accumulate over the steps. `predict` then recomputes eps, for DDIM,
                 which uses both.
    step_noise   `step_noise(k) -> (B, C, H, W)`, standard normal, or (1, C, H, W) for all samples,
                 is called in each step that adds noise, with the number k of earlier network calls.
                 None means PyTorch's global generator. Samplers that add no noise accept it, too.
    on_step      `on_step(k, t, x, x_0)` is called after each step: x is the state after the step,
                 and x_0 is the model's prediction at timestep t.

They return images (B, C, H, W), in [-1, 1] if `clip_x_0`, and raise ValueError for too many or too
few steps. A step leads from timestep t to s; `a_t` and `a_s` are alpha_bar there. These are Python
numbers, so the loops never synchronise with a GPU.

With N steps, the error of a sampler of order p is proportional to N^-p. It is the error of x_0 or,
with fresh noise, of the distribution of x_0. test_sampler_orders.py measures both. `sampling_times`
(functions/timesteps.py) lists the timesteps: with N = T, they are T-1, ..., 1, 0, -1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import exp, expm1, sqrt

import torch
from torch import Tensor

from functions.denoiser import Predictor
from functions.noise_scheduler import NoiseScheduler
from functions.timesteps import Steps, sampling_times

# The variance of the noise of `ddpm_sample` in a step from t to s (Section 3.2). Beta tilde, the
# posterior's, would be exact if there were a single image, so that x_0 were known. Beta would be
# exact if images were standard normal noise. Ho's face runs have beta tilde. With all T steps beta
# is as good, but with few steps it leaves noise in the images.
VARIANCES = {"small": NoiseScheduler.posterior_variance, "large": NoiseScheduler.step_beta}
StepNoise = Callable[[int], Tensor]
OnStep = Callable[[int, int, Tensor, Tensor], None]


def draw_noise(step_noise: StepNoise | None, k: int, x: Tensor) -> Tensor:
    """Return the standard normal noise of step k, in the shape of x."""
    return step_noise(k) if step_noise else torch.randn_like(x)


@torch.no_grad()
def ddpm_sample(
    denoiser: Predictor,
    x_T: Tensor,
    steps: Steps = None,
    variance: str = "small",
    spacing: str = "trailing",
    clip_x_0: bool = True,
    step_noise: StepNoise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Sample by ancestral sampling (Ho et al. 2020, arXiv:2006.11239, Algorithm 2); order 1.

    Args:
        variance: that of the step's noise, a key of VARIANCES.
    """
    scheduler = denoiser.scheduler
    times = sampling_times(scheduler, steps, spacing)

    # Line 1: x_T ~ N(0, I), which the caller draws.
    x = x_T
    # Line 2: for t = T, ..., 1. A step leads from t to s.
    for k, (t, s) in enumerate(pairwise(times)):
        # Algorithm 2 computes the mean from x_t and eps. This code computes x_0 first (Eq. 15, from
        # the eps of the network, in `predict`) and then the mean (Eq. 7), so that x_0 can be
        # clipped. Without clipping the mean is the same.
        x_0, _ = denoiser.predict(x, t, clip_x_0)
        # The variance of Eq. 7, left out here, is one of VARIANCES: "small".
        mean, _ = scheduler.q_posterior(x_0, x, t, s)
        sigma_squared = VARIANCES[variance](scheduler, t, s)

        # Line 3: z ~ N(0, I), and z = 0 in the last step, which leads to the clean image.
        z = draw_noise(step_noise, k, x) if s >= 0 else 0.0
        # Line 4: x_{t-1} = mean + sigma_t z.
        x = mean + sigma_squared**0.5 * z
        if on_step:
            on_step(k, t, x, x_0)
    # Lines 5 and 6: end for, and return x_0.
    return x


@torch.no_grad()
def ddim_sample(
    denoiser: Predictor,
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
        eta: 0 adds no noise. 1 adds noise with the posterior's variance, as `ddpm_sample` does.
    """
    scheduler = denoiser.scheduler
    times = sampling_times(scheduler, steps, spacing)
    x = x_T
    for k, (t, s) in enumerate(pairwise(times)):
        x_0, eps = denoiser.predict(x, t, clip_x_0)
        a_s = scheduler.alpha_bar(s)
        # Eq. 16: sigma is eta times the standard deviation of the posterior.
        sigma = eta * sqrt(scheduler.posterior_variance(t, s))
        # Eq. 12: of the variance 1 - a_s, fresh noise has sigma^2 and eps has the rest, which
        # rounding can bring slightly below 0.
        x = sqrt(a_s) * x_0 + sqrt(max(1 - a_s - sigma**2, 0)) * eps
        if sigma > 0:
            x = x + sigma * draw_noise(step_noise, k, x)
        if on_step:
            on_step(k, t, x, x_0)
    return x


@torch.no_grad()
def dpm_solver_sample(
    denoiser: Predictor,
    x_T: Tensor,
    steps: Steps = None,
    eta: float = 0.0,
    spacing: str = "trailing",
    clip_x_0: bool = True,
    step_noise: StepNoise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Sample by DPM-Solver++ 2M or its SDE form (Lu et al. 2022, arXiv:2211.01095); order 2.

    They are the paper's Algorithm 2 and Eq. 18, in whose symbols x_t = alpha x_0 + sigma eps and
    lambda = log(alpha / sigma): alpha is sqrt(alpha_bar).

    Args:
        eta: 0 solves the ODE and adds no noise. 1 solves the SDE, whose fresh noise corrects the
            errors of earlier steps.
    """
    scheduler = denoiser.scheduler
    times = sampling_times(scheduler, steps, spacing)
    # A last step to the clean image has order 1, because lambda is infinite there. With fewer than
    # 15 steps any last step has order 1, for stability (`lower_order_final` of the authors' code).
    last_is_first_order = times[-1] == -1 or len(times) - 1 < 15

    x = x_T
    previous_x_0 = previous_h = None
    for k, (t, s) in enumerate(pairwise(times)):
        x_0, _ = denoiser.predict(x, t, clip_x_0)
        a_t = scheduler.alpha_bar(t)
        a_s = scheduler.alpha_bar(s)
        alpha_s = sqrt(a_s)
        sigma_s = sqrt(1 - a_s)
        sigma_t = sqrt(1 - a_t)
        # h is the step in lambda, half the log-SNR, and r is the previous h divided by this h.
        h = (scheduler.log_snr(s) - scheduler.log_snr(t)) / 2

        # D is the x_0 that the step uses. A step of order 2 extrapolates D from the last two
        # predictions. The first step has one prediction, so its order is 1; with eta = 0 it is a
        # step of DDIM.
        if k == 0 or (s == times[-1] and last_is_first_order):
            D = x_0
        else:
            r = previous_h / h
            D = (1 + 1 / (2 * r)) * x_0 - 1 / (2 * r) * previous_x_0
        x = sigma_s / sigma_t * exp(-eta * h) * x - alpha_s * expm1(-(1 + eta) * h) * D

        if eta > 0 and sigma_s > 0:
            x = x + sigma_s * sqrt(-expm1(-2 * eta * h)) * draw_noise(step_noise, k, x)
        previous_x_0 = x_0
        previous_h = h
        if on_step:
            on_step(k, t, x, x_0)
    return x


@dataclass(frozen=True)
class Sampler:
    """A row of `SAMPLERS`: a sampler with the scripts' defaults."""

    function: Callable[..., Tensor]
    # The spacing, and the options that only some samplers have, with the scripts' defaults.
    options: dict[str, str | float]
    order: int = 1


SAMPLERS = {
    "ddpm": Sampler(ddpm_sample, {"spacing": "trailing", "variance": "small"}),
    "ddim": Sampler(ddim_sample, {"spacing": "trailing", "eta": 0.0}),
    # The paper's eta is 0. The scripts' eta is 1: with 20 calls of a network that predicts eps it
    # has by far the lowest feature distance, and of one that predicts v about the same as 0. With
    # eta 0 "logsnr" is the better spacing. Both are measured in docs/predicting-v.md.
    "dpm++": Sampler(dpm_solver_sample, {"spacing": "logsnr", "eta": 1.0}, order=2),
}
