"""Reverse processes: from pure noise x_T to an image x_0, with any noise-predicting model.

Each sampler is a plain function `f(model, scheduler, x_T, steps=N) -> x_0`:

    ddpm_sample          ancestral: fresh noise in every step corrects the errors of earlier ones; for many steps
    ddim_sample          order 1; deterministic with eta = 0, and `ddpm_sample` with eta = 1
    dpm_solver_sample    DPM-Solver++ 2M, order 2; deterministic with eta = 0, and with eta = 1 its SDE form
    ipndm_sample         iPNDM, up to order 4, deterministic
    ddim_encode          DDIM the other way: from an image to the noise it comes from

Their defaults are the papers'; what the scripts choose is in functions/sampler_settings.py. They share:

    model        any callable `(x_t (B, ...), t (B,) int64) -> eps (B, ...)`, called once a step
    x_T          (B, ...) standard normal, any B; sample i depends on x_T[i] and its own step noise alone
    steps        network calls, 1 .. T; None: all T
    spacing      which timesteps they are at, "trailing" or "logsnr": see `sampling_times`
    times        instead of these two the timesteps themselves, falling; x_T is the state at the first, and what is
                 returned that at the last, -1 the clean image. `sampling_times` makes them for a part of the way.
    clip_x_0     clip the model's x_0 to [-1, 1] *before* it enters the step, and recompute eps to agree with it:
                 clipping only at the end lets errors in colour build up over the chain
    eps_scale    s >= 1, by which the model's eps is divided before x_0 is formed (epsilon scaling, Ning et al. 2024,
                 arXiv:2308.15321): a model that meets its own errors, as in training it never did, predicts too much
                 noise. Useful values are near 1, such as 1.005.
    step_noise   `step_noise(k) -> (B, ...)`, standard normal, called once for each step that adds noise with the number
                 of network calls made before it (0, 1, ...); None: PyTorch's global generator. All else is
                 deterministic. Samplers that add no noise never call it; they take it so that all are called alike.
    on_step      `on_step(k, t, x, x_0)` sees each step's result: x, the state after it, and x_0, the prediction from
                 timestep t that it was made with

They return images (B, ...), in [-1, 1] when `clip_x_0`; `SamplingError` says what cannot be had. Coefficients are made
from alpha_bar in float64 before the loop and are plain numbers in it, so that nothing passes between the host and the
device there. `a` is alpha_bar at the beginning of a step, `a_next` at its end.
"""

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from functions.noise_scheduler import NoiseScheduler
from functions.timesteps import SamplingError, prepare, repeat_times
from functions.timesteps import trailing_timesteps as trailing_timesteps  # also for those who import it from here

Model = Callable[[Tensor, Tensor], Tensor]
StepNoise = Callable[[int], Tensor]
OnStep = Callable[[int, int, Tensor, Tensor], None]


@torch.no_grad()
def ddpm_sample(
    model: Model,
    scheduler: NoiseScheduler,
    x_T: Tensor,
    steps: int | None = None,
    variance: str = "small",
    *,
    spacing: str = "trailing",
    times: Sequence[int] | None = None,
    clip_x_0: bool = True,
    eps_scale: float = 1.0,
    step_noise: StepNoise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, arXiv:2006.11239, Algorithm 2); weak order 1.

    Algorithm 2 subtracts eps from x_t directly; the same mean is written here through x_0 (Eqs. 15 and 7), because
    that is where clipping belongs. Without clipping the two are identical. With fewer than T steps beta is that of the
    longer step, 1 - alpha_bar_t / alpha_bar_s (Nichol and Dhariwal 2021, arXiv:2102.09672, Eq. 19).

    Args:
        variance: of the step's noise (Section 3.2): "small", the posterior's, as in Ho's face runs; or "large", beta,
            which is as good with all steps and leaves noise in the images with few.
    """
    if variance not in ("small", "large"):
        raise SamplingError(f"variance is {variance!r}; it can be small or large")
    times, t, alpha_bar = prepare(scheduler, x_T, steps, spacing, times, eps_scale)
    a, a_next = alpha_bar[:-1], alpha_bar[1:]
    beta = 1 - a / a_next
    of_x_0, of_x = beta * a_next.sqrt() / (1 - a), (1 - a_next) * (1 - beta).sqrt() / (1 - a)  # Eq. 7
    std = (beta if variance == "large" else beta * (1 - a_next) / (1 - a)).sqrt() * (a_next < 1)  # no noise on an image
    x = x_T
    for k, (a_t, c_0, c_t, sigma) in enumerate(rows(a, of_x_0, of_x, std)):
        x_0, _ = predict(model, x, t[k], a_t, clip_x_0, eps_scale)
        x = c_0 * x_0 + c_t * x
        if sigma > 0:
            x = x + sigma * draw(step_noise, k, x)
        if on_step:
            on_step(k, times[k], x, x_0)
    return x


@torch.no_grad()
def ddim_sample(
    model: Model,
    scheduler: NoiseScheduler,
    x_T: Tensor,
    steps: int | None = None,
    eta: float = 0.0,
    *,
    spacing: str = "trailing",
    times: Sequence[int] | None = None,
    clip_x_0: bool = True,
    eps_scale: float = 1.0,
    step_noise: StepNoise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """DDIM (Song et al. 2021, arXiv:2010.02502, Eqs. 12 and 16); order 1.

    Args:
        eta: 0 is deterministic; 1 adds the posterior's noise and is `ddpm_sample` with the same steps.
    """
    if not 0 <= eta <= 1:
        raise SamplingError(f"eta is {eta}; it can be 0 to 1")
    times, t, alpha_bar = prepare(scheduler, x_T, steps, spacing, times, eps_scale)
    a, a_next = alpha_bar[:-1], alpha_bar[1:]
    variance = eta**2 * (1 - a_next) / (1 - a) * (1 - a / a_next)  # Eq. 16
    of_x_0, of_eps = a_next.sqrt(), (1 - a_next - variance).clamp(min=0).sqrt()  # Eq. 12
    x = x_T
    for k, (a_t, c_0, c_eps, sigma) in enumerate(rows(a, of_x_0, of_eps, variance.sqrt())):
        x_0, eps = predict(model, x, t[k], a_t, clip_x_0, eps_scale)
        x = c_0 * x_0 + c_eps * eps
        if sigma > 0:
            x = x + sigma * draw(step_noise, k, x)
        if on_step:
            on_step(k, times[k], x, x_0)
    return x


@torch.no_grad()
def dpm_solver_sample(
    model: Model,
    scheduler: NoiseScheduler,
    x_T: Tensor,
    steps: int | None = None,
    eta: float = 0.0,
    *,
    spacing: str = "trailing",
    times: Sequence[int] | None = None,
    clip_x_0: bool = True,
    eps_scale: float = 1.0,
    step_noise: StepNoise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """DPM-Solver++ 2M (Lu et al. 2022, arXiv:2211.01095, Algorithm 2), and its SDE form (Eq. 18); order 2.

    Integrates the model's x_0 over lambda = log(sqrt(alpha_bar / (1 - alpha_bar))), extrapolated from two steps. The
    first step has one only and is of order 1, DDIM's. So is the last, if it ends at the clean image, where lambda is
    infinite, or if there are fewer than 15 steps (the authors' `lower_order_final`, for stability).

    Args:
        eta: 0 solves the ODE and is deterministic; 1 solves the SDE, whose fresh noise lets later steps correct the
            errors of earlier ones.
    """
    if not 0 <= eta <= 1:
        raise SamplingError(f"eta is {eta}; it can be 0 to 1")
    times, t, alpha_bar = prepare(scheduler, x_T, steps, spacing, times, eps_scale)
    a, a_next = alpha_bar[:-1], alpha_bar[1:]
    h = torch.logit(alpha_bar).diff() / 2  # infinite in the step to the clean image
    of_x = ((1 - a_next) / (1 - a)).sqrt() * (-eta * h.clamp(max=100)).exp()  # sigma_next / sigma exp(-eta h)
    of_x_0 = -a_next.sqrt() * torch.expm1(-(1 + eta) * h)
    std = (-(1 - a_next) * torch.expm1(-2 * eta * h.clamp(max=100))).sqrt()
    extrapolate = torch.cat([torch.zeros(1), h[1:] / (2 * h[:-1])])  # 1 / (2 r)
    if times[-1] == -1 or len(h) < 15:
        extrapolate[-1] = 0
    x, x_0_before = x_T, None
    for k, (a_t, c_x, c_0, ahead, sigma) in enumerate(rows(a, of_x, of_x_0, extrapolate, std)):
        x_0, _ = predict(model, x, t[k], a_t, clip_x_0, eps_scale)
        x_0_ahead = x_0 + ahead * (x_0 - x_0_before) if ahead else x_0
        x = c_x * x + c_0 * x_0_ahead
        if sigma > 0:
            x = x + sigma * draw(step_noise, k, x)
        x_0_before = x_0
        if on_step:
            on_step(k, times[k], x, x_0)
    return x


ADAMS_BASHFORTH = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


@torch.no_grad()
def ipndm_sample(
    model: Model,
    scheduler: NoiseScheduler,
    x_T: Tensor,
    steps: int | None = None,
    *,
    spacing: str = "trailing",
    times: Sequence[int] | None = None,
    clip_x_0: bool = True,
    eps_scale: float = 1.0,
    history: Sequence[Tensor] = (),
    step_noise: StepNoise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """iPNDM (Zhang and Chen 2023, arXiv:2204.13902; PNDM: Liu et al. 2022, arXiv:2202.09778, Eqs. 9 and 12); order 2,
    or 4 on equal steps of sigma from exact start values.

    With y = x / sqrt(alpha_bar) and sigma = sqrt((1 - alpha_bar) / alpha_bar) DDIM's ODE is dy = eps dsigma (Song et
    al. 2021, Eq. 14), here in Adams-Bashforth steps. The first three look back on less and have orders 1, 2 and 3,
    where PNDM spends nine more network calls. The weights are those for equal steps, whatever the steps are.

    Args:
        history: eps at up to 3 earlier times, the newest last: where another run stopped, this one goes on with it.
    """
    times, t, alpha_bar = prepare(scheduler, x_T, steps, spacing, times, eps_scale)
    a, a_next = alpha_bar[:-1], alpha_bar[1:]
    of_x, of_eps = ddim_step(a, a_next)
    if len(history) > 3:
        raise SamplingError(f"history has {len(history)} earlier eps; the method looks back on 3")
    x, history = x_T, deque(history, maxlen=4)
    for k, (a_t, c_x, c_eps) in enumerate(rows(a, of_x, of_eps)):
        x_0, eps = predict(model, x, t[k], a_t, clip_x_0, eps_scale)
        history.append(eps)
        eps_ahead = sum(w * e for w, e in zip(ADAMS_BASHFORTH[len(history) - 1], reversed(history), strict=True))
        x = c_x * x + c_eps * eps_ahead
        if clip_x_0 and times[k + 1] == -1:
            x = x.clamp(-1, 1)  # the extrapolated eps does not know of the clipping
        if on_step:
            on_step(k, times[k], x, x_0)
    return x


@torch.no_grad()
def ddim_encode(
    model: Model,
    scheduler: NoiseScheduler,
    x_0: Tensor,
    steps: int | None = None,
    *,
    spacing: str = "trailing",
    times: Sequence[int] | None = None,
    eps_scale: float = 1.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """DDIM run backwards, from an image to the noise it comes from (Song et al. 2021, Section 4.3); order 1.

    `ddim_sample` without clipping and with the same steps, spacing or times then returns the image but for an error
    that falls as 1 / steps. Nothing is clipped, since clipping cannot be undone.

    Args:
        x_0: (B, ...) images, or states at the last of `times`; the latter are given falling, as they are for sampling.

    Returns:
        (B, ...) x_T; or x_t at the first of `times`.
    """
    times, _, alpha_bar = prepare(scheduler, x_0, steps, spacing, times, eps_scale)
    times, alpha_bar = times[::-1], alpha_bar.flip(0)
    called_at = [max(time, 0) for time in times[:-1]]  # the model knows no time of a clean image: the next to it
    t = repeat_times(called_at, x_0)
    of_x, of_eps = ddim_step(alpha_bar[:-1], alpha_bar[1:])
    x = x_0
    for k, (a_t, c_x, c_eps) in enumerate(rows(alpha_bar[:-1], of_x, of_eps)):
        predicted, eps = predict(model, x, t[k], a_t, False, eps_scale)
        x = c_x * x + c_eps * eps
        if on_step:
            on_step(k, called_at[k], x, predicted)
    return x


def rows(*coefficients: Tensor) -> list[list[float]]:
    """(N,) tables as N rows of Python numbers, one row a step."""
    return torch.stack(coefficients, dim=1).tolist()


def predict(model: Model, x: Tensor, t: Tensor, a: float, clip_x_0: bool, eps_scale: float) -> tuple[Tensor, Tensor]:
    """The model's x_0 (Eq. 15 of DDPM) and the eps that agrees with it."""
    eps = model(x, t)
    if eps_scale != 1:
        eps = eps / eps_scale
    x_0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
    if clip_x_0:
        x_0 = x_0.clamp(-1, 1)
        eps = (x - a**0.5 * x_0) / (1 - a) ** 0.5
    return x_0, eps


def ddim_step(a: Tensor, a_next: Tensor) -> tuple[Tensor, Tensor]:
    """What x and eps are multiplied by in dy = eps dsigma, y = x / sqrt(a), sigma = sqrt((1 - a) / a): either way."""
    of_x = (a_next / a).sqrt()
    return of_x, (1 - a_next).sqrt() - of_x * (1 - a).sqrt()


def draw(step_noise: StepNoise | None, k: int, like: Tensor) -> Tensor:
    """Step k's standard normal noise: the caller's, or PyTorch's."""
    return step_noise(k) if step_noise else torch.randn_like(like)
