"""Exponential moving average of the weights: what samples are drawn with (Ho et al. 2020, Appendix B)."""

import torch
from torch import nn


@torch.no_grad()
def update_ema(
    ema_model: nn.Module, model: nn.Module, step: int, decay: float, ramp: bool = True
) -> None:
    """Move the parameters of `ema_model` (a deep copy of `model`) a little towards those of `model`, in place.

    They are averaged with min(decay, (1 + step) / (10 + step)): early on the average follows the weights closely,
    since remembering the initial ones for 1 / (1 - decay) steps would spoil the samples of a short run.

    Args:
        step: optimiser steps done before this update's own, 0, 1, ...
        decay: the final decay, 0 <= decay < 1, such as 0.9999.
        ramp: False for a model that began with good weights, which are worth remembering: the decay is final at once.
    """
    weight = 1 - (min(decay, (1 + step) / (10 + step)) if ramp else decay)
    torch._foreach_lerp_(list(ema_model.parameters()), list(model.parameters()), weight)
