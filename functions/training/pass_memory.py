"""What a forward and a backward pass of the network take in memory: exact, and for free.

The passes run over fake tensors, which have shapes and types but no memory, so this also works for what does not fit.
"""

import copy
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode  # what torch.compile traces with
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from functions.losses import noise_prediction_loss
from functions.noise_scheduler import NoiseScheduler
from functions.prediction import autocast


def kept_for_backward(
    model: nn.Module, scheduler: NoiseScheduler, images: int, precision: torch.dtype, device: torch.device
) -> int:
    """Bytes that are alive between the forward and the backward pass of `images` images, parameters excluded."""
    return bytes_of_a_pass(model, scheduler, images, precision, device)[0]


def peak_of_a_pass(
    model: nn.Module, scheduler: NoiseScheduler, images: int, precision: torch.dtype, device: torch.device
) -> int:
    """The most bytes at any moment of a forward and a backward pass, beside parameters and their gradients."""
    return bytes_of_a_pass(model, scheduler, images, precision, device)[1]


def bytes_of_a_pass(
    model: nn.Module, scheduler: NoiseScheduler, images: int, precision: torch.dtype, device: torch.device
) -> tuple[int, int]:
    """Kept for backward, and the peak."""
    scheduler = copy.deepcopy(scheduler)  # whose tables will be fake
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        state = {name: mode.from_tensor(t) for name, t in [*model.named_parameters(), *model.named_buffers()]}
        for parameter in state.values():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)  # as from an earlier pass of the same step
        x_0 = torch.zeros(images, model.channels, model.image_size, model.image_size, device=device)
        t = torch.zeros(images, dtype=torch.int64, device=device)
        noise = torch.zeros_like(x_0)
        scheduler.alpha_bar(t)  # its table is there from now on

        def passes(network: nn.Module) -> tuple[int, int]:
            with LiveBytes() as live:
                with autocast(device, precision):
                    loss = noise_prediction_loss(network, scheduler, x_0, t, noise).sum()
                kept = live.now
                loss.backward()
            return kept, live.peak

        fake = {f"network.{name}": value for name, value in state.items()}
        return torch.func.functional_call(Applied(model), fake, (passes,))


class Applied(nn.Module):
    """A function's view of a network, as a module: so backward too, within it, sees the fake parameters."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, function: Callable[[nn.Module], tuple[int, int]]) -> tuple[int, int]:
        return function(self.network)


class LiveBytes(TorchDispatchMode):
    """Adds up the storages of all tensors that operations return, for as long as these live."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen: dict[int, int] = {}  # bytes by the storage's address

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in known | self.seen.keys():  # not a view, nor written in place
                    self.add(storage)
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        self.seen[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.remove, storage._cdata)

    def remove(self, address: int) -> None:
        self.now -= self.seen.pop(address)
