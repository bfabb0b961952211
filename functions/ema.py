"""The exponential moving average (EMA) of the weights (Ho et al. 2020, Appendix B)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def weights_of(network: nn.Module) -> list[Tensor]:
    """Return what is averaged of a network: parameters, and buffers such as a batch norm's means.

    Our own network has no buffers.
    """
    return [*network.parameters(), *filter(torch.is_floating_point, network.buffers())]


@torch.no_grad()
def update_ema(
    averages: Sequence[Tensor],
    weights: Sequence[Tensor],
    step: int,
    decay: float,
    ramp: bool,
) -> None:
    """Update each average in place: average = decay * average + (1 - decay) * weight.

    Args:
        averages, weights: `weights_of` a copy of the network, and of the network.
        step: the number of earlier updates, 0, 1, ...
        decay: the final decay, 0 <= decay < 1, such as 0.9999.
        ramp: use min(decay, (1 + step) / (10 + step)). False is for trained weights.
    """
    # A small decay early in training makes the average forget the random initial weights.
    # Otherwise they would persist for about 1 / (1 - decay) steps, and spoil samples of short runs.
    if ramp:
        decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(averages, weights, 1 - decay)
