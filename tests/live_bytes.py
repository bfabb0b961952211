"""The memory of a training pass on CUDA, counted on a CPU.

`python -m tests.live_bytes` prints the table of memory in docs/speed.md.
"""

import copy
import weakref
from dataclasses import asdict
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

# torch.compile traces with this mode, so it knows every operation's shapes.
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from config import EXPERIMENTS, Experiment
from data.batches import FREE_MEMORY_FRACTION
from functions.denoiser import Denoiser
from functions.losses import denoising_loss
from functions.noise_scheduler import NoiseScheduler
from functions.optimizers import is_matrix
from models.blocks import GroupNorm, Upsample
from models.unet import UNet

GB = 1e9
# The memory of usual GPUs, in GiB.
GPUS = (8, 12, 16, 24)
# This much is left for CUDA itself, cuDNN's workspaces, and gaps between blocks of memory.
RESERVE = 1.0 * GB
# These data sets are copied to a GPU with enough memory.
DATA_SETS = {"FFHQ": 70_000 * 128**2 * 3, "CIFAR10": 60_000 * 32**2 * 3}


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


def norm_of_cuda(norm: GroupNorm, x: Tensor) -> Tensor:
    """Do what the group norm does on CUDA: PyTorch's kernel there copies x, and keeps the copy."""
    with torch.autocast("cpu", enabled=False):
        weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
        return F.group_norm(x.contiguous(), norm.num_groups, weight, bias, norm.eps)


def upsampling_of_cuda(upsample: Upsample, x: Tensor) -> Tensor:
    """Do what the upsampling does on CUDA, where autocast doubles in float32."""
    return upsample.conv(F.interpolate(x.float(), scale_factor=2.0, mode="nearest"))


def peak_of_pass(network: UNet, batch_size: int) -> int:
    """Return how many bytes a pass in bfloat16 needs at its peak, beside weights and gradients."""
    # Parameters are not copied: the memo says that they are their own copies.
    memo = {id(parameter): parameter for parameter in network.parameters()}
    network = copy.deepcopy(network, memo)
    denoiser = Denoiser(network, NoiseScheduler(1000), precision=torch.bfloat16)
    # The scheduler makes its table at the first call, which should not be counted.
    denoiser.scheduler.alpha_bar(torch.zeros(1, dtype=torch.int64))

    # Fake tensors have shapes and types without memory, so nothing is computed.
    with (
        FakeTensorMode(allow_non_fake_inputs=True) as fake,
        mock.patch.object(GroupNorm, "forward", norm_of_cuda),
        mock.patch.object(Upsample, "forward", upsampling_of_cuda),
    ):
        for module in network.modules():
            for name, parameter in module.named_parameters(recurse=False):
                fake_parameter = fake.from_tensor(parameter)
                setattr(module, name, fake_parameter)
                # In training the gradients exist from the first pass of a step on.
                fake_parameter.grad = torch.zeros_like(fake_parameter)
        x_0 = torch.zeros(batch_size, network.channels, network.image_size, network.image_size)
        t = torch.zeros(batch_size, dtype=torch.int64)
        with LiveBytes() as live:
            denoising_loss(denoiser, x_0, t, x_0).sum().backward()
    return live.peak


def peaks_of(experiment: Experiment, batch_sizes: list[int]) -> tuple[UNet, int, list[int]]:
    """Return the network, the bytes of its weights and of what follows them, and these peaks."""
    # Shapes alone count, so the weights get no values.
    with torch.device("meta"):
        network = UNet(**asdict(experiment.model))
    network.to(memory_format=torch.channels_last).to_empty(device="cpu")

    config = experiment.diffusion
    averages = int(config.ema_decay > 0)
    state = 0
    for parameter in network.parameters():
        moments = 1 if config.optimizer == "muon" and is_matrix(parameter) else 2
        # The weight, its gradient, the optimiser's moments and the averages are in float32.
        state += 4 * (2 + moments + averages) * parameter.numel()
    return network, state, [state + peak_of_pass(network, size) for size in batch_sizes]


def memory_row(name: str, experiment: Experiment) -> str:
    """Return the row of an experiment: what it needs, and the batch sizes that fit in GPUS."""
    config = experiment.diffusion
    effective = config.effective_batch
    divisors = [size for size in range(1, effective + 1) if effective % size == 0]
    network, state, peaks = peaks_of(experiment, divisors)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    peaks = dict(zip(divisors, peaks, strict=True))
    cells = [f"`{name}`", f"{parameters / 1e6:.1f} M", f"{state / GB:.2f}", str(config.batch_size)]
    cells += [f"{peaks[config.batch_size] / GB:.2f}", f"{peaks[1] / GB:.2f}"]
    data_set = DATA_SETS.get(config.dataset_name, 0)
    for gibibytes in GPUS:
        room = gibibytes * 2**30 - RESERVE
        if data_set <= FREE_MEMORY_FRACTION * room:
            room -= data_set
        cells.append(str(max((size for size in divisors if peaks[size] <= room), default="none")))
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    for name, experiment in EXPERIMENTS.items():
        print(memory_row(name, experiment), flush=True)
