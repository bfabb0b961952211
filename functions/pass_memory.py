"""What a forward and a backward pass of the network take in memory: exact, and for free.

The passes run over fake tensors, which have shapes and types but no memory, so this also works for what does not fit.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode  # what torch.compile traces with
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from functions.device import autocast
from functions.losses import noise_prediction_loss
from functions.noise_scheduler import NoiseScheduler


def kept_for_backward(
    model: nn.Module, scheduler: NoiseScheduler, images: int, precision: torch.dtype, device: torch.device
) -> int:
    """Bytes that autograd keeps between the forward and the backward pass of `images` images, parameters excluded.

    Every saved tensor is seen by a hook, and each storage counted once.
    """
    storages, own = {}, set()

    def see(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage.nbytes()
        return tensor

    with fake_state(model) as state:
        own.update(tensor.untyped_storage()._cdata for tensor in state.values())
        with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
            loss = fake_loss(model, state, scheduler, images, precision, device)
        del loss  # and with it the graph, but only here: freed storages' addresses would be used, and counted, again
    return sum(storages.values())


def peak_of_a_pass(
    model: nn.Module, scheduler: NoiseScheduler, images: int, precision: torch.dtype, device: torch.device
) -> int:
    """The most bytes at any moment of a forward and a backward pass, beside parameters and their gradients."""
    with fake_state(model) as state:
        for parameter in state.values():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)  # as from an earlier pass of the same step
        with LiveBytes() as live:
            fake_loss(model, state, scheduler, images, precision, device).backward()
    return live.peak


@contextmanager
def fake_state(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Fake parameters and buffers of the model, among fake tensors alone."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield {name: mode.from_tensor(t) for name, t in [*model.named_parameters(), *model.named_buffers()]}


def fake_loss(
    model: nn.Module,
    state: dict[str, Tensor],
    scheduler: NoiseScheduler,
    images: int,
    precision: torch.dtype,
    device: torch.device,
) -> Tensor:
    network = lambda x_t, t: torch.func.functional_call(model, state, (x_t, t))
    x_0 = torch.zeros(images, model.channels, model.image_size, model.image_size, device=device)
    t = torch.zeros(images, dtype=torch.int64, device=device)
    with autocast(device, precision):
        return noise_prediction_loss(network, scheduler, x_0, t, torch.randn_like(x_0)).sum()


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
