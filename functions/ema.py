"""The exponential moving average (EMA) of the weights, with which samples are drawn.

Ho et al. 2020 explain it in Appendix B.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def update_ema(
    averages: Sequence[Tensor],
    parameters: Sequence[Tensor],
    step: int,
    decay: float,
    ramp: bool = True,
) -> None:
    """Update each average in place: average = decay * average + (1 - decay) * parameter.

    Args:
        averages: the parameters of a deep copy of the network, made before training.
        parameters: the network's, in the same order.
        step: the number of earlier updates, 0, 1, ...
        decay: the final decay, 0 <= decay < 1, such as 0.9999.
        ramp: use min(decay, (1 + step) / (10 + step)) as the decay. False uses the final decay from
            the first step on, for training that starts from trained weights.
    """
    # A small decay early in training makes the average forget the random initial weights.
    # Otherwise they would persist for about 1 / (1 - decay) steps, and spoil samples of short runs.
    if ramp:
        decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(averages, parameters, 1 - decay)
