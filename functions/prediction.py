"""What a network's output means: the one place between networks and the mathematics.

The loss calls a `Denoiser`, which `train` and `rebuild` make, and compares what the network
predicts, a row of OBJECTIVES. All others want (x_0, eps) at (x_t, t): samplers ask `predict` for
it, the variational bound asks `interpret`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from functions.noise_scheduler import Coefficient, NoiseScheduler, Timestep

# (x_t (B, ...), t (B,) int64) -> eps (B, ...). A `Denoiser` returns what its objective says
# instead, so whoever wants eps asks `predict`.
Model = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Objective:
    """What a network predicts at (x_t, t): a tensor of x_t's shape, linear in x_0 and eps."""

    # (scheduler, x_0, t, noise) -> what the network's output is compared with.
    target: Callable[..., Tensor]
    # (scheduler, x_t, t, output) -> the x_0 and the eps that x_t and the output imply.
    x_0_and_eps: Callable[..., tuple[Tensor, Tensor]]
    # (scheduler, t) -> the squared error of eps over that of the output, in the same x_t.
    eps_factor: Callable[..., Coefficient]
    # What diffusers calls it, as `prediction_type`; None if it has no such networks.
    diffusers: str | None


# What a config's `objective` can be. Nothing else in the project decides by it.
OBJECTIVES = {
    # Ho et al. 2020, Algorithm 1: the target is the noise (Eq. 14), and x_0 follows from eps by
    # Eq. 15.
    "eps": Objective(
        target=lambda scheduler, x_0, t, noise: noise,
        x_0_and_eps=lambda scheduler, x_t, t, eps: (scheduler.predict_x_0(x_t, t, eps), eps),
        eps_factor=lambda scheduler, t: 1.0,
        diffusers="epsilon",
    ),
    # Salimans and Ho 2022, arXiv:2202.00512, Section 4. An error of v means sqrt(alpha_bar) times
    # that error in eps. In x_0 it means -sqrt(1 - alpha_bar) times that error.
    "v": Objective(
        target=NoiseScheduler.v,
        x_0_and_eps=NoiseScheduler.predict_from_v,
        eps_factor=NoiseScheduler.alpha_bar,
        diffusers="v_prediction",
    ),
}


@dataclass(frozen=True)
class Denoiser:
    """A network and its schedule, as a `Model`.

    The network runs under autocast; x_t and what it predicts are in float32. Raises ValueError for
    an objective that is not in OBJECTIVES.
    """

    network: nn.Module
    scheduler: NoiseScheduler  # the one that the network was trained with
    precision: torch.dtype = torch.float32  # of the network's matrix products and convolutions
    objective: str = "eps"  # what the network predicts: a name of OBJECTIVES
    # (x_0, x_t, t, scheduler) -> a better x_0, as functions/sampling/calibration.py makes it.
    calibration: Callable[..., Tensor] | None = None
    # Of a larger batch the network takes so many images at a time; None means all of it.
    at_a_time: int | None = None

    def __post_init__(self) -> None:
        # A checkpoint may have anything in this place. A list, say, has no hash.
        if self.objective not in tuple(OBJECTIVES):
            raise ValueError(
                f"objective is {self.objective!r}; it can be {' or '.join(OBJECTIVES)}"
            )

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        if self.at_a_time and len(x_t) > self.at_a_time:
            parts = zip(x_t.split(self.at_a_time), t.split(self.at_a_time), strict=True)
            return torch.cat([self(*part) for part in parts])
        half = self.precision != torch.float32
        # No weight is used twice, so a cache of the weights in half precision would be of no use.
        # And a CUDA graph cannot have one.
        with torch.autocast(x_t.device.type, self.precision, enabled=half, cache_enabled=False):
            return self.network(x_t.float(), t).float()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Switch dropout off within the context; afterwards the network is as it was."""
        training = self.network.training
        self.network.eval()
        try:
            yield
        finally:
            self.network.train(training)


def objective_of(model: Model) -> Objective:
    """Return what a model predicts: eps, if it is no `Denoiser`, which says what."""
    return OBJECTIVES[getattr(model, "objective", "eps")]


def predict(
    model: Model, scheduler: NoiseScheduler, x_t: Tensor, t: Timestep, clip_x_0: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the x_0 that a model sees in x_t, and the eps that agrees with it: (B, C, H, W) each.

    Args:
        model: a `Denoiser`, or any callable (x_t, t) -> eps.
        t: one timestep for all images, or (B,) int64.
        clip_x_0: clip x_0 to the range of images, [-1, 1], and recompute eps from it.
    """
    t_of_images = t
    if isinstance(t, int):
        t_of_images = torch.full((len(x_t),), t, device=x_t.device)
    x_0, eps = interpret(model, scheduler, x_t, t, model(x_t, t_of_images))
    if clip_x_0:
        x_0 = x_0.clamp(-1, 1)
        eps = scheduler.predict_eps(x_t, t, x_0)
    return x_0, eps


def interpret(
    model: Model, scheduler: NoiseScheduler, x_t: Tensor, t: Timestep, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the same as `predict`, given the output of the model for (x_t, t)."""
    x_0, eps = objective_of(model).x_0_and_eps(scheduler, x_t, t, out)
    calibration = getattr(model, "calibration", None)
    if calibration:
        calibrated = calibration(x_0, x_t, t, scheduler)
        # Where a calibration changes nothing it returns x_0 itself, and eps agrees with it already.
        if calibrated is not x_0:
            x_0 = calibrated
            eps = scheduler.predict_eps(x_t, t, x_0)
    return x_0, eps
