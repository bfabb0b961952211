"""What a forward pass keeps in memory for the backward pass, counted exactly.

`python -m tests.live_bytes` prints the table of memory in docs/speed.md.
"""

import copy
import weakref
from dataclasses import asdict

import torch
from torch import Tensor, nn

# torch.compile traces with this mode, so it knows every operation's shapes.
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from config import EXPERIMENTS, Experiment
from functions.losses import denoising_loss
from functions.noise_scheduler import NoiseScheduler
from functions.optimizers import is_matrix
from models.unet import UNet

GB = 1e9


class LiveBytes(TorchDispatchMode):
    """Add up the storages of all tensors that operations return, for as long as these live.

    The attribute `now` is the number of bytes that are alive, and `peak` is the largest `now`.
    """

    def __init__(self):
        super().__init__()
        self.now = 0
        self.peak = 0
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
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.remove, storage._cdata, storage.nbytes())
        return result

    def remove(self, address: int, size: int) -> None:
        self.seen.remove(address)
        self.now -= size


def bytes_of_pass(network: nn.Module, precision: torch.dtype, batch_size: int) -> tuple[int, int]:
    """Return the bytes that are alive between the forward and the backward pass, and their peak.

    The peak is that of both passes. The weights and their gradients do not count.
    """
    device = next(network.parameters()).device

    # Parameters are not copied: the memo says that they are their own copies.
    memo = {id(parameter): parameter for parameter in network.parameters()}
    network = copy.deepcopy(network, memo)

    # The scheduler makes its table at the first call, which should not be counted.
    scheduler = NoiseScheduler(1000)
    scheduler.alpha_bar(torch.zeros(1, dtype=torch.int64, device=device))

    # Fake tensors have shapes and types without memory, so nothing is computed.
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        for module in network.modules():
            for name, parameter in module.named_parameters(recurse=False):
                fake_parameter = fake.from_tensor(parameter)
                setattr(module, name, fake_parameter)
                # In training the gradients exist from the first pass of a step on.
                fake_parameter.grad = torch.zeros_like(fake_parameter)

        size = network.image_size
        x_0 = torch.zeros(batch_size, network.channels, size, size, device=device)
        noise = torch.zeros_like(x_0)
        t = torch.zeros(batch_size, dtype=torch.int64, device=device)

        autocast = torch.autocast(device.type, precision, enabled=precision != torch.float32)
        with LiveBytes() as live:
            with autocast:
                loss = denoising_loss(network, scheduler, x_0, t, noise).sum()
            kept = live.now
            loss.backward()
    return kept, live.peak


def kept_per_image(network: nn.Module, precision: torch.dtype) -> float:
    """Return how many bytes are alive between the forward and the backward pass of an image.

    It is a third of the difference between batches of four and of one, so what is kept for a batch
    of any size does not count.
    """
    kept_of_1, _ = bytes_of_pass(network, precision, 1)
    kept_of_4, _ = bytes_of_pass(network, precision, 4)
    return (kept_of_4 - kept_of_1) / 3


def memory_row(name: str, experiment: Experiment) -> str:
    """Return the row of an experiment: all that training in bfloat16 keeps in memory, in GB."""
    # Shapes alone count, so the weights get no values.
    with torch.device("meta"):
        network = UNet(**asdict(experiment.model))
    network.to(memory_format=torch.channels_last).to_empty(device="cpu")

    config = experiment.diffusion
    averages = len(config.power_ema) + (config.ema_decay > 0)
    parameters = 0
    state = 0
    for parameter in network.parameters():
        moments = 1 if config.optimizer == "muon" and is_matrix(parameter) else 2
        parameters += parameter.numel()
        # The weight, its gradient, the optimiser's moments and the averages are in float32.
        state += 4 * (2 + moments + averages) * parameter.numel()
    cells = [f"`{name}`", f"{parameters / 1e6:.1f} M", f"{state / GB:.2f}", str(config.batch_size)]
    for mode, batch_size in (
        ("none", config.batch_size),
        ("norms", config.batch_size),
        ("norms", 1),
    ):
        network.set_recompute(mode)
        _, peak = bytes_of_pass(network, torch.bfloat16, batch_size)
        cells.append(f"{(state + peak) / GB:.2f}")
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    for name, experiment in EXPERIMENTS.items():
        print(memory_row(name, experiment), flush=True)
