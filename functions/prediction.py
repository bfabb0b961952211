"""What a network's output means: the one place between it and the mathematics.

The loss calls a `Denoiser` (`train` and `rebuild` make them); samplers and the bound ask `predict` for (x_0, eps) at
(x_t, t), which alone knows whether the network predicts eps or v, and what is done to its x_0 before it is used.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from functions.noise_scheduler import NoiseScheduler, Timestep

OBJECTIVES = ("eps", "v")
# (x_t (B, ...), t (B,) int64) -> eps (B, ...); a `Denoiser` may give v instead
Model = Callable[[Tensor, Tensor], Tensor]
Calibration = Callable[[Tensor, Tensor, Timestep, NoiseScheduler], Tensor]  # (x_0, x_t, t, scheduler) -> a better x_0


@dataclass(frozen=True)
class Denoiser:
    """A network and its schedule, as a `Model`: under autocast, with x_t and what the network predicts in float32."""

    network: nn.Module
    scheduler: NoiseScheduler  # the one that the network was trained with
    precision: torch.dtype = torch.float32  # of the network's matrix products and convolutions
    objective: str = "eps"  # what the network predicts, or "v" (Salimans and Ho 2022, arXiv:2202.00512)
    # In sampling, eps is divided by this (epsilon scaling, Ning et al. 2024, arXiv:2308.15321): a model that meets its
    # own errors, which it never did in training, predicts too much noise. 1.005 is a usual value.
    eps_scale: float = 1.0
    calibration: Calibration | None = None  # as functions/sampling/calibration.py makes them

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective is {self.objective!r}; it can be {' or '.join(OBJECTIVES)}")

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(x_t.device.type, self.precision, enabled=self.precision != torch.float32):
            return self.network(x_t.float(), t).float()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within, the network is without dropout; afterwards it is as it was."""
        training = self.network.training
        self.network.eval()
        try:
            yield
        finally:
            self.network.train(training)


def objective_of(model: Model) -> str:
    """What a model predicts: "eps", if it is not a `Denoiser` that says otherwise."""
    return model.objective if isinstance(model, Denoiser) else "eps"


def predict(
    model: Model, scheduler: NoiseScheduler, x_t: Tensor, t: Timestep, clip_x_0: bool = False
) -> tuple[Tensor, Tensor]:
    """The x_0 that a model sees in x_t (Eq. 15 of Ho et al. 2020), and the eps that agrees with it.

    Args:
        model: a `Denoiser`, or any callable (x_t, t) -> eps.
        x_t: (B, C, H, W) at timestep t: one for all, or (B,) int64.
        clip_x_0: clip x_0 to the range of images, [-1, 1], and recompute eps from it.

    Returns:
        x_0 and eps, (B, C, H, W) each.
    """
    t_of_images = torch.full((len(x_t),), t, device=x_t.device) if isinstance(t, int) else t
    x_0, eps = interpret(model, scheduler, x_t, t, model(x_t, t_of_images))
    if clip_x_0:
        x_0 = x_0.clamp(-1, 1)
        eps = scheduler.predict_eps(x_t, t, x_0)
    return x_0, eps


def interpret(
    model: Model, scheduler: NoiseScheduler, x_t: Tensor, t: Timestep, output: Tensor
) -> tuple[Tensor, Tensor]:
    """As `predict`, from what the model gave for (x_t, t)."""
    if objective_of(model) == "v":
        x_0, eps = scheduler.predict_from_v(x_t, t, output)
    else:
        x_0, eps = scheduler.predict_x_0(x_t, t, output), output
    if isinstance(model, Denoiser) and model.eps_scale != 1:
        eps = eps / model.eps_scale
        x_0 = scheduler.predict_x_0(x_t, t, eps)
    if isinstance(model, Denoiser) and model.calibration:
        x_0 = model.calibration(x_0, x_t, t, scheduler)
        eps = scheduler.predict_eps(x_t, t, x_0)
    return x_0, eps
