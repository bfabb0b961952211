"""Adam (Kingma and Ba 2015, arXiv:1412.6980), as PyTorch has it, for weights in any memory layout."""

import torch
from torch import Tensor


class Adam(torch.optim.Adam):
    """PyTorch's fused Adam; what it does to each number does not depend on where the number stands.

    On the CPU its kernel wants contiguous tensors and copies others there and back, in every step: for convolutions in
    channels_last that took longer than Adam itself. So it gets views in the order of the memory.
    """

    def _init_group(self, group: dict, *lists: list[Tensor]) -> bool:
        """Fill the lists of parameters, gradients, moments and step counts that the kernel is called with."""
        result = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = map(in_memory_order, tensors)
        return result


def in_memory_order(tensor: Tensor) -> Tensor:
    """A contiguous view of a tensor in channels_last; others as they are."""
    if tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.permute(0, 2, 3, 1)
    return tensor
