"""The exponential moving average (EMA) of the weights (Ho et al. 2020, Appendix B)."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def update_ema(
    averages: Sequence[Tensor],
    parameters: Sequence[Tensor],
    step: int,
    decay: float,
    ramp: bool,
) -> None:
    """Update each average in place: average = decay * average + (1 - decay) * parameter.

    Args:
        averages, parameters: those of a copy of the network and of the network, in the same order.
        step: the number of earlier updates, 0, 1, ...
        decay: the final decay, 0 <= decay < 1, such as 0.9999.
        ramp: use min(decay, (1 + step) / (10 + step)). False is for trained weights.
    """
    # A small decay early in training makes the average forget the random initial weights.
    # Otherwise they would persist for about 1 / (1 - decay) steps, and spoil samples of short runs.
    if ramp:
        decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(averages, parameters, 1 - decay)
