"""Exponential moving average (EMA) of the weights (Ho et al. 2020, Appendix B).

Samples are drawn with the averaged weights.
"""

import torch
from torch import nn


@torch.no_grad()
def update_ema(
    ema_model: nn.Module, model: nn.Module, step: int, decay: float, ramp: bool = True
) -> None:
    """Update each average in place: average = decay * average + (1 - decay) * parameter.

    Args:
        ema_model: a deep copy of `model`, made before training.
        step: the number of earlier updates, 0, 1, ...
        decay: the final decay, 0 <= decay < 1, such as 0.9999.
        ramp: use min(decay, (1 + step) / (10 + step)) as the decay. False uses the final decay from
            the first step on, for training that starts from trained weights.
    """
    # A small decay early in training makes the average forget the random initial weights.
    # Otherwise they would persist for about 1 / (1 - decay) steps, and spoil samples of short runs.
    if ramp:
        decay = min(decay, (1 + step) / (10 + step))
    averages = list(ema_model.parameters())
    parameters = list(model.parameters())
    torch._foreach_lerp_(averages, parameters, 1 - decay)
