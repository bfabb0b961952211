"""Skip a step whose numbers are not finite, without waiting for the device."""

import torch
from torch import Tensor, nn

from functions.support import processes


@torch.no_grad()
def found_inf(grad_norm: Tensor, network: nn.Module, before: list[Tensor]) -> Tensor:
    """Return 1.0 if a step is to be skipped, else 0.0, the same in all processes: ().

    It is skipped if the norm of the gradient () is not finite, or if a number in a buffer, such as
    a batch norm's mean, no longer is. Its buffers then become as they were `before` it.
    """
    skipped = ~grad_norm.isfinite()
    if not before:
        return skipped.float()
    # Some are infinite from the start, such as a mask.
    for old, buffer in zip(before, network.buffers(), strict=True):
        skipped = skipped | (old.isfinite() & ~buffer.isfinite()).any()
    # All processes have the same gradient, but each has its own buffers.
    skipped = processes.all_reduce(skipped.float()) > 0
    for old, buffer in zip(before, network.buffers(), strict=True):
        buffer.copy_(torch.where(skipped, old, buffer))
    return skipped.float()
