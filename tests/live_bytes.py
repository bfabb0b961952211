"""What a forward pass keeps in memory for the backward pass, counted exactly."""

import copy
import weakref

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode  # what torch.compile traces with
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from functions.losses import denoising_loss
from functions.noise_scheduler import NoiseScheduler


class LiveBytes(TorchDispatchMode):
    """Adds up the storages of all tensors that operations return, for as long as these live."""

    def __init__(self):
        super().__init__()
        self.now, self.seen = 0, set()  # bytes; addresses

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)
        }
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given | self.seen:  # not a view, nor written in place
                    self.seen.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.remove, storage._cdata, storage.nbytes())
        return result

    def remove(self, address: int, size: int) -> None:
        self.seen.remove(address)
        self.now -= size


def kept_per_image(network: nn.Module, precision: torch.dtype) -> float:
    """Bytes that are alive between the forward and the backward pass of an image: a third of those of three more."""
    memo = {id(parameter): parameter for parameter in network.parameters()}  # these are not copied
    kept, device, network = {}, next(network.parameters()).device, copy.deepcopy(network, memo)
    # Shapes and types without memory, in no time
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        for module in network.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, fake.from_tensor(parameter))
        for images in (1, 4):
            x_0 = torch.zeros(
                images, network.channels, network.image_size, network.image_size, device=device
            )
            noise, t = torch.zeros_like(x_0), torch.zeros(images, dtype=torch.int64, device=device)
            scheduler = NoiseScheduler(1000)
            scheduler.alpha_bar(t)  # its table is there from now on
            with (
                LiveBytes() as live,
                torch.autocast(device.type, precision, enabled=precision != torch.float32),
            ):
                loss = denoising_loss(network, scheduler, x_0, t, noise).sum()
                kept[images] = live.now
            del loss
    return (kept[4] - kept[1]) / 3
