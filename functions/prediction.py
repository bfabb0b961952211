"""What a network's output means: the one place between networks and the mathematics.

The loss calls a `Denoiser`, which `train` and `rebuild` make, and compares what the network
predicts, eps or v. All others want (x_0, eps) at (x_t, t): samplers ask `predict` for it, the
variational bound asks `interpret`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from functions.noise_scheduler import NoiseScheduler, Timestep

# (x_t (B, ...), t (B,) int64) -> eps (B, ...). A `Denoiser` returns v instead if that is its
# objective, so whoever wants eps asks `predict`.
Model = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Denoiser:
    """A network and its schedule, as a `Model`.

    The network runs under autocast; x_t and what it predicts are in float32.
    """

    network: nn.Module
    scheduler: NoiseScheduler  # the one that the network was trained with
    precision: torch.dtype = torch.float32  # of the network's matrix products and convolutions
    # The network predicts this: "eps", or "v" (Salimans and Ho 2022, arXiv:2202.00512).
    objective: str = "eps"
    # (x_0, x_t, t, scheduler) -> a better x_0, as functions/sampling/calibration.py makes it.
    calibration: Callable | None = None

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
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


def predict(
    model: Model, scheduler: NoiseScheduler, x_t: Tensor, t: Timestep, clip_x_0: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the x_0 that a model sees in x_t, and the eps that agrees with it: (B, C, H, W) each.

    x_0 follows from eps by Eq. 15 of Ho et al. 2020.

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
    if getattr(model, "objective", "eps") == "v":
        x_0, eps = scheduler.predict_from_v(x_t, t, out)
    else:
        x_0 = scheduler.predict_x_0(x_t, t, out)
        eps = out

    calibration = getattr(model, "calibration", None)
    if calibration:
        calibrated = calibration(x_0, x_t, t, scheduler)
        # Where a calibration changes nothing it returns x_0 itself, and eps agrees with it already.
        if calibrated is not x_0:
            x_0 = calibrated
            eps = scheduler.predict_eps(x_t, t, x_0)
    return x_0, eps
