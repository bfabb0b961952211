"""What a forward pass keeps in memory for the backward pass, counted exactly."""

import copy
import weakref

import torch
from torch import Tensor, nn

# torch.compile traces with this mode, so it knows every operation's shapes.
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from functions.losses import denoising_loss
from functions.noise_scheduler import NoiseScheduler


class LiveBytes(TorchDispatchMode):
    """Add up the storages of all tensors that operations return, for as long as these live.

    The attribute `now` is the number of bytes that are alive.
    """

    def __init__(self):
        super().__init__()
        self.now = 0
        # These are the addresses of the storages that are counted.
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        leaves = tree_leaves((args, kwargs))
        given = {leaf.untyped_storage()._cdata for leaf in leaves if isinstance(leaf, Tensor)}

        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                # A view, or a tensor that was written in place, takes no memory of its own.
                if storage._cdata not in given | self.seen:
                    self.seen.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.remove, storage._cdata, storage.nbytes())
        return result

    def remove(self, address: int, size: int) -> None:
        self.seen.remove(address)
        self.now -= size


def kept_per_image(network: nn.Module, precision: torch.dtype) -> float:
    """Return how many bytes are alive between the forward and the backward pass of an image.

    It is a third of the difference between batches of four and of one, so what is kept for a batch
    of any size does not count.
    """
    kept = {}
    device = next(network.parameters()).device

    # Parameters are not copied: the memo says that they are their own copies.
    memo = {id(parameter): parameter for parameter in network.parameters()}
    network = copy.deepcopy(network, memo)

    # Fake tensors have shapes and types without memory, so nothing is computed.
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        for module in network.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, fake.from_tensor(parameter))

        size = network.image_size
        for batch_size in (1, 4):
            x_0 = torch.zeros(batch_size, network.channels, size, size, device=device)
            noise = torch.zeros_like(x_0)
            t = torch.zeros(batch_size, dtype=torch.int64, device=device)

            # The scheduler makes its table at the first call, which should not be counted.
            scheduler = NoiseScheduler(1000)
            scheduler.alpha_bar(t)

            autocast = torch.autocast(device.type, precision, enabled=precision != torch.float32)
            with LiveBytes() as live, autocast:
                loss = denoising_loss(network, scheduler, x_0, t, noise).sum()
                kept[batch_size] = live.now
            # Without the loss its graph is freed, so the next batch starts from nothing.
            del loss
    return (kept[4] - kept[1]) / 3
