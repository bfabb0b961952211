"""What a network's output means: the one place between it and the mathematics.

The loss calls a `Denoiser` (`train` and `rebuild` make them); samplers and the bound ask `predict` for (x_0, eps) at
(x_t, t). For a network that predicts v, `Denoiser.__call__` alone changes: it returns the eps that v stands for,
sqrt(alpha_bar) v + sqrt(1 - alpha_bar) x_t. Dividing the loss by alpha_bar, in losses.py, makes it v's own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from functions.noise_scheduler import NoiseScheduler, Timestep

Model = Callable[[Tensor, Tensor], Tensor]  # (x_t (B, ...), t (B,) int64) -> eps (B, ...)


@dataclass(frozen=True)
class Denoiser:
    """A network and its schedule, as a `Model`: under autocast, with x_t and eps in float32."""

    network: nn.Module
    scheduler: NoiseScheduler  # the one that the network was trained with
    precision: torch.dtype = torch.float32  # of the network's matrix products and convolutions

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


def predict(
    model: Model, scheduler: NoiseScheduler, x_t: Tensor, t: Timestep, clip_x_0: bool = False
) -> tuple[Tensor, Tensor]:
    """The x_0 that a model sees in x_t (Eq. 15 of Ho et al. 2020), and the eps that agrees with it.

    Args:
        model: a `Denoiser`, or any callable (x_t, t) -> eps.
        x_t: (B, C, H, W) at timestep t: one for all, or (B,) int64. At t = -1 x_t is the clean image, which models do
            not know: they are asked as at t = 0. There x_0 is x_t, and nothing can be clipped.
        clip_x_0: clip x_0 to the range of images, [-1, 1], and recompute eps from it.

    Returns:
        x_0 and eps, (B, C, H, W) each.
    """
    t_of_images = torch.full((len(x_t),), max(t, 0), device=x_t.device) if isinstance(t, int) else t
    eps = model(x_t, t_of_images)
    x_0 = scheduler.predict_x_0(x_t, t, eps)
    if clip_x_0:
        x_0 = x_0.clamp(-1, 1)
        eps = scheduler.predict_eps(x_t, t, x_0)
    return x_0, eps


def scaled_eps(model: Model, eps_scale: float) -> Model:
    """The model with its eps divided by eps_scale >= 1 (epsilon scaling, Ning et al. 2024, arXiv:2308.15321).

    A model that meets its own errors, which it never did in training, predicts too much noise. 1.005 is a usual value.
    """
    return (lambda x_t, t: model(x_t, t) / eps_scale) if eps_scale != 1 else model
