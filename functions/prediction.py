"""What a network predicts, and how x_0 and eps follow from it.

A network predicts eps or v; the table OBJECTIVES has a row for each. No other module needs to know
which. The loss compares the output with the row's target. Samplers get x_0 and eps from `predict`,
and the variational bound gets them from `interpret`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from functions.noise_scheduler import Coefficient, NoiseScheduler, Timestep

# (x_t (B, C, H, W), t (B,) int64) -> eps (B, C, H, W). A `Denoiser` may return v instead, so code
# that needs eps calls `predict` and not the model.
Model = Callable[[Tensor, Tensor], Tensor]

# The log-SNR, log(alpha_bar / (1 - alpha_bar)), from which and up to which a guide is asked. At
# higher and at lower noise it helps little, so its calls there are saved (Kynkaanniemi et al. 2024,
# arXiv:2404.07724). docs/better-than-the-model.md measures this.
GUIDED_LOG_SNR = (-7.0, 6.0)


@dataclass(frozen=True)
class Objective:
    """A quantity that a network predicts at (x_t, t).

    It has the shape of x_t, and is linear in x_0 and eps.
    """

    # (scheduler, x_0, t, noise) -> the tensor that the loss compares the network's output with.
    target: Callable[..., Tensor]
    # (scheduler, x_t, t, output) -> the x_0 and the eps that x_t and the output imply.
    x_0_and_eps: Callable[..., tuple[Tensor, Tensor]]
    # (scheduler, t) -> the squared error of that eps, divided by the squared error of the output.
    eps_factor: Callable[..., Coefficient]
    # The `prediction_type` of diffusers; None if diffusers has no such networks.
    diffusers: str | None


# The values of a config's `objective`. Only this table knows what they mean.
OBJECTIVES = {
    # Ho et al. 2020: the target is the noise (Eq. 14), and Eq. 15 gives x_0.
    "eps": Objective(
        target=lambda scheduler, x_0, t, noise: noise,
        x_0_and_eps=lambda scheduler, x_t, t, eps: (scheduler.predict_x_0(x_t, t, eps), eps),
        eps_factor=lambda scheduler, t: 1.0,
        diffusers="epsilon",
    ),
    # Salimans and Ho 2022, arXiv:2202.00512, Section 4:
    #     v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0
    #     x_0 = sqrt(alpha_bar) x_t - sqrt(1 - alpha_bar) v
    # An error d of v is an error of sqrt(alpha_bar) d in eps, and of -sqrt(1 - alpha_bar) d in x_0.
    "v": Objective(
        target=NoiseScheduler.v,
        x_0_and_eps=NoiseScheduler.predict_from_v,
        eps_factor=NoiseScheduler.alpha_bar,
        diffusers="v_prediction",
    ),
}


@dataclass(frozen=True)
class Denoiser:
    """A network with its schedule and its objective: (x_t, t) -> the objective's prediction.

    The network runs under autocast; input and output are float32, (B, C, H, W). Raises ValueError
    for an objective that is not in OBJECTIVES.
    """

    network: nn.Module
    # The schedule that the network was trained with.
    scheduler: NoiseScheduler
    # The dtype of the network's matrix products and convolutions.
    precision: torch.dtype = torch.float32
    # A key of OBJECTIVES.
    objective: str = "eps"
    # (x_0, x_t, t, scheduler) -> a better x_0, as functions/sampling/calibration.py makes it.
    calibration: Callable[..., Tensor] | None = None
    # A worse model, from whose x_0 `predict` moves away, and the weight w of this guidance. At 1
    # the guide has no effect. functions/sampling/guidance.py explains both.
    guide: "Denoiser | None" = None
    guidance: float = 1.0

    def __post_init__(self) -> None:
        # The objective comes from a checkpoint, so it may have any type. A list has no hash and
        # cannot be looked up in a dict, but it can be compared with the entries of a tuple.
        if self.objective not in tuple(OBJECTIVES):
            raise ValueError(
                f"objective is {self.objective!r}; it can be {' or '.join(OBJECTIVES)}"
            )

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        half = self.precision != torch.float32
        # Autocast's cache of cast weights is off: no weight is used twice in a forward pass.
        with torch.autocast(x_t.device.type, self.precision, enabled=half, cache_enabled=False):
            return self.network(x_t.float(), t).float()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put the network in eval mode within the context, and restore its mode afterwards."""
        training = self.network.training
        self.network.eval()
        try:
            yield
        finally:
            self.network.train(training)


def objective_of(model: Model) -> Objective:
    """Return the objective of a `Denoiser`. Any other model predicts eps."""
    return OBJECTIVES[getattr(model, "objective", "eps")]


def predict(
    model: Model, scheduler: NoiseScheduler, x_t: Tensor, t: Timestep, clip_x_0: bool = False
) -> tuple[Tensor, Tensor]:
    """Call the model, and return its x_0 and eps at (x_t, t): (B, C, H, W) each.

    Args:
        model: a `Denoiser`, or any callable (x_t, t) -> eps.
        x_t: (B, C, H, W).
        t: one timestep for the whole batch, or (B,) int64. With a guide it must be one timestep.
        clip_x_0: clip x_0 to the range of images, [-1, 1], and recompute eps from it.
    """
    t_batch = t
    if isinstance(t, int):
        t_batch = torch.full((len(x_t),), t, device=x_t.device)
    x_0, eps = interpret(model, scheduler, x_t, t, model(x_t, t_batch))
    guide = getattr(model, "guide", None)
    if guide and is_guided(scheduler, t):
        # The guided x_0 is x_0(guide) + w (x_0(model) - x_0(guide)). It is computed in a form in
        # which w = 1 changes no bit. eps is linear in x_0, so the same mix of both eps is the eps
        # of the guided x_0. Neither network's x_0 is clipped here; the guided x_0 is clipped below.
        guide_x_0, guide_eps = predict(guide, scheduler, x_t, t)
        x_0 = x_0 + (model.guidance - 1) * (x_0 - guide_x_0)
        eps = eps + (model.guidance - 1) * (eps - guide_eps)
    if clip_x_0:
        x_0 = x_0.clamp(-1, 1)
        eps = scheduler.predict_eps(x_t, t, x_0)
    return x_0, eps


def is_guided(scheduler: NoiseScheduler, t: int) -> bool:
    """Return whether a guide is asked at timestep t."""
    alpha_bar = scheduler.alpha_bar(t)
    # The signal-to-noise ratio is alpha_bar / (1 - alpha_bar). With tiny betas alpha_bar may be 1,
    # so nothing is divided by 1 - alpha_bar.
    lowest, highest = map(math.exp, GUIDED_LOG_SNR)
    return lowest * (1 - alpha_bar) <= alpha_bar <= highest * (1 - alpha_bar)


def interpret(
    model: Model, scheduler: NoiseScheduler, x_t: Tensor, t: Timestep, output: Tensor
) -> tuple[Tensor, Tensor]:
    """Return x_0 and eps, given the model's output at (x_t, t): (B, C, H, W) each.

    A calibration, if the model has one, is applied to x_0.
    """
    x_0, eps = objective_of(model).x_0_and_eps(scheduler, x_t, t, output)
    calibration = getattr(model, "calibration", None)
    if calibration:
        calibrated = calibration(x_0, x_t, t, scheduler)
        # A calibration that changes nothing at t returns x_0 itself. Then eps agrees with x_0.
        if calibrated is not x_0:
            x_0 = calibrated
            eps = scheduler.predict_eps(x_t, t, x_0)
    return x_0, eps
