"""Draw t, the noise and the augmentation of a step (Algorithm 1, lines 3 and 4)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from functions.support.random_numbers import generator_of


class StepDraws(NamedTuple):
    """The random numbers of one optimiser step, for its B images."""

    t: Tensor  # (B,) int64, uniform in 0 .. T-1
    noise: Tensor  # (B, C, H, W) float32, standard normal
    flip: Tensor  # (B,) bool, True with probability 1/2
    # (B,) float32, uniform in [-1, 1). The rotation is this fraction of the largest angle.
    rotation: Tensor
    # (B,) float32, uniform in [0, 1). Below condition_dropout, a label is dropped.
    condition_drop: Tensor


def training_draws(
    seed: int,
    step: int,
    effective_batch: int,
    image_shape: Sequence[int],
    timesteps: int,
    device: torch.device,
) -> StepDraws:
    """Draw t and noise (Algorithm 1, lines 3 and 4) and the augmentation for an effective batch."""
    # The draws are made for the whole effective batch and cut later. So an image's draws depend on
    # its place in the effective batch, but not on the batch size.
    # These four draws come from one generator, so another draw between them, or another order,
    # would change every run. A new field needs a separate generator:
    # generator_of(device, seed, f"training {NAME}", step).
    options = {"generator": generator_of(device, seed, "training", step), "device": device}
    return StepDraws(
        t=torch.randint(timesteps, (effective_batch,), **options),
        noise=torch.randn(effective_batch, *image_shape, **options),
        flip=torch.rand(effective_batch, **options) < 0.5,
        rotation=2 * torch.rand(effective_batch, **options) - 1,
        condition_drop=torch.rand(
            effective_batch,
            generator=generator_of(device, seed, "training label", step),
            device=device,
        ),
    )
