"""How much memory a training will take, before it is started."""

import sys

import torch
from torch import Tensor, nn

from functions.device import autocast
from functions.losses import noise_prediction_loss
from functions.noise_scheduler import NoiseScheduler

try:
    import resource
except ImportError:  # Windows has no such module; the process itself is then left out of the estimate
    resource = None

FLOAT_BYTES = 4  # weights, gradients, Adam's two moments and the EMA are all float32


def kept_for_backward(
    model: nn.Module, scheduler: NoiseScheduler, images: int, precision: torch.dtype, device: torch.device
) -> int:
    """Bytes that autograd keeps between the forward and the backward pass of `images` images, parameters excluded.

    Exact: every saved tensor is seen by a hook, and each storage counted once.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {}

    def see(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    x_0 = torch.zeros(images, model.channels, model.image_size, model.image_size, device=device)
    t = torch.zeros(images, dtype=torch.int64, device=device)
    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor), autocast(device, precision):
        loss = noise_prediction_loss(model, scheduler, x_0, t, torch.randn_like(x_0)).sum()
    del loss  # and with it the graph, but only here: freed storages' addresses would be used, and counted, again
    return sum(storages.values())


def training_memory(
    model: nn.Module,
    scheduler: NoiseScheduler,
    batch_size: int,
    effective_batch: int,
    has_ema: bool,
    precision: torch.dtype,
    device: torch.device,
    baseline: int,
    resident: int = 0,
) -> dict[str, int]:
    """An estimate of a training's peak, in bytes, by what takes it; the values add up to the peak.

    On the CPU it is the process's, with the `baseline` that Python and PyTorch took before the model was made; on a GPU
    it is what PyTorch allocates there, the `resident` bytes of images that are kept on it included.
    """
    one, two = (kept_for_backward(model, scheduler, images, precision, device) for images in (1, 2))
    parameters = sum(parameter.numel() for parameter in model.parameters()) * FLOAT_BYTES
    image = model.channels * model.image_size**2 * FLOAT_BYTES
    return {
        "weights": parameters,
        "gradients": parameters,
        "Adam": 2 * parameters,
        "EMA": parameters if has_ema else 0,
        "activations": one + (batch_size - 1) * (two - one),
        "noise and images": (effective_batch + 4 * batch_size) * image,
        "data set": resident,
        "Python and PyTorch": baseline if device.type == "cpu" else 0,
    }


def process_memory() -> int:
    """The most memory that this process has had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource else 0
    return peak if sys.platform == "darwin" else 1024 * peak
