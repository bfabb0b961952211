"""Exponential moving average of the weights (Ho et al. 2020, Appendix B).

Samples are drawn with it.
"""

import torch
from torch import nn


@torch.no_grad()
def update_ema(
    ema_model: nn.Module, model: nn.Module, step: int, decay: float, ramp: bool = True
) -> None:
    """Move the parameters of `ema_model` a little towards those of `model`, in place.

    Args:
        ema_model: a deep copy of `model`, made before training.
        step: optimiser steps done before this update's own, 0, 1, ...
        decay: the final decay, 0 <= decay < 1, such as 0.9999.
        ramp: raise the decay up to the final one, as min(decay, (1 + step) / (10 + step)). False
            is for a model that began with good weights: the decay is the final one at once.
    """
    # Early on the average follows the weights closely. Otherwise it would remember the initial
    # weights for 1 / (1 - decay) steps, and they would spoil the samples of a short run.
    if ramp:
        decay = min(decay, (1 + step) / (10 + step))
    averages = list(ema_model.parameters())
    parameters = list(model.parameters())
    torch._foreach_lerp_(averages, parameters, 1 - decay)
