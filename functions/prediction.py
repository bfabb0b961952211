"""What a network's output means: the one place between it and the mathematics.

The loss calls a `Denoiser` (`train` and `rebuild` make them) and compares what the network predicts, eps or v. All
others ask for (x_0, eps) at (x_t, t): samplers `predict`, the bound `interpret`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from functions.noise_scheduler import NoiseScheduler, Timestep

# (x_t (B, ...), t (B,) int64) -> eps (B, ...). A `Denoiser` gives v if that is its objective: so ask `predict`
Model = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Denoiser:
    """A network and its schedule, as a `Model`: under autocast, with x_t and what the network predicts in float32."""

    network: nn.Module
    scheduler: NoiseScheduler  # the one that the network was trained with
    precision: torch.dtype = torch.float32  # of the network's matrix products and convolutions
    # What the network predicts, or "v" (Salimans and Ho 2022, arXiv:2202.00512)
    objective: str = "eps"
    # (x_0, x_t, t, scheduler) -> a better x_0: functions/sampling/calibration.py
    calibration: Callable | None = None

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        half = self.precision != torch.float32
        # No weight is used twice, so that no cache of them is needed; and a CUDA graph cannot have one
        with torch.autocast(x_t.device.type, self.precision, enabled=half, cache_enabled=False):
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


def predict(
    model: Model, scheduler: NoiseScheduler, x_t: Tensor, t: Timestep, clip_x_0: bool = False
) -> tuple[Tensor, Tensor]:
    """The x_0 that a model sees in x_t (Eq. 15 of Ho et al. 2020), and the eps that agrees with it: (B, C, H, W) each.

    The model is a `Denoiser`, or any callable (x_t, t) -> eps; t is one timestep for all, or (B,) int64. `clip_x_0`
    clips x_0 to the range of images, [-1, 1], and recomputes eps from it.
    """
    t_of_images = torch.full((len(x_t),), t, device=x_t.device) if isinstance(t, int) else t
    x_0, eps = interpret(model, scheduler, x_t, t, model(x_t, t_of_images))
    if clip_x_0:
        x_0 = x_0.clamp(-1, 1)
        eps = scheduler.predict_eps(x_t, t, x_0)
    return x_0, eps


def interpret(
    model: Model, scheduler: NoiseScheduler, x_t: Tensor, t: Timestep, out: Tensor
) -> tuple[Tensor, Tensor]:
    """As `predict`, from what the model gave for (x_t, t)."""
    if getattr(model, "objective", "eps") == "v":
        x_0, eps = scheduler.predict_from_v(x_t, t, out)
    else:
        x_0, eps = scheduler.predict_x_0(x_t, t, out), out
    if calibration := getattr(model, "calibration", None):
        better = calibration(x_0, x_t, t, scheduler)
        x_0, eps = better, eps if better is x_0 else scheduler.predict_eps(x_t, t, better)
    return x_0, eps
