"""Measurements on one network in one process: clocks, counted FLOPs, bytes kept for backward, ceilings."""

import itertools
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
# PyTorch's counter knows attention on GPUs alone
CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, out_shape=None, **__: sdpa_flop_count(
        q, k, v
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, out_shape=None, **__: (
        sdpa_backward_flop_count(grad, q, k, v)
    ),
}

STATUS, MEMINFO = Path("/proc/self/status"), Path("/proc/meminfo")  # Linux


def kilobytes(path: Path) -> dict[str, int]:
    """The amounts of memory in a file of Linux's /proc, in bytes."""
    fields = [line.replace(":", " ").split() for line in path.read_text().splitlines()]
    return {field[0]: 1024 * int(field[1]) for field in fields if field[-1] == "kB"}


def process_memory() -> int:
    """The most memory that this process has had, in bytes; 0 where the system does not say."""
    return kilobytes(STATUS)["VmHWM"] if STATUS.exists() else 0


class Stopwatch:
    """Moments of the device's own time: on CUDA events, so that reading the clock in between holds nothing up."""

    def __init__(self, device: torch.device):
        self.cuda, self.moments = device.type == "cuda", []
        if self.cuda:
            torch.cuda.synchronize()
        self.mark()

    def mark(self) -> None:
        if self.cuda:
            self.moments.append(torch.cuda.Event(enable_timing=True))
            self.moments[-1].record()
        else:
            self.moments.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between each moment and the next; on CUDA waits for the last."""
        pairs = list(itertools.pairwise(self.moments))
        if not self.cuda:
            return [after - before for before, after in pairs]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in pairs]


def seconds_of(work: Callable[[], object], device: torch.device, times: int = 1) -> float:
    """Of one `work()`, the mean of several in a row: on CUDA they hide what launching each takes."""
    watch = Stopwatch(device)
    for _ in range(times):
        work()
    watch.mark()
    return watch.seconds()[0] / times


def noise_loss(network: Callable, x_t: Tensor, t: Tensor, noise: Tensor, dtype: torch.dtype) -> Tensor:
    """The loss of functions/losses.py for an x_t that is there already: eps in float32, squared error, mean."""
    with torch.autocast(x_t.device.type, dtype, enabled=dtype != torch.float32):
        eps = network(x_t, t)
    return (eps.float() - noise).square().mean()


def counted_flops(work: Callable[[], object]) -> int:
    """FLOPs of the matrix products, convolutions and attention in `work()`; a multiplication and an addition are two.

    Inside autograd functions and in backward passes they are counted too.
    """
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        work()
    return counter.get_total_flops()


def kept_bytes(module: nn.Module, loss_of: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps from a forward pass for the backward, in unique storages, without the parameters'."""
    own = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    kept = {}  # holds on to the storages: the address of one that was freed would come again

    def see(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        loss = loss_of()
    total = sum(storage.nbytes() for storage in kept.values())
    del loss
    return total


def allocated_bytes(loss_of: Callable[[], Tensor]) -> int:
    """What a forward pass leaves allocated on the GPU while its graph is there; the other way to count `kept_bytes`."""
    loss_of()  # for what libraries allocate once
    before = torch.cuda.memory_allocated()
    loss = loss_of()
    grown = torch.cuda.memory_allocated() - before
    del loss
    return grown


def slope(of: Callable[[int], float]) -> float:
    """What each further image adds, between batches of 1 and 3: without what does not depend on the batch."""
    return (of(3) - of(1)) / 2


def peak_bytes(device: torch.device) -> int:
    """The most memory so far: of the process on the CPU, of tensors on CUDA."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else process_memory()


class Ceiling:
    """The fastest matrix product and the fastest convolution, of several sizes and layouts, that this machine has.

    The first call tries the candidates; later ones measure the best again.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, tiny: bool = False):
        self.dtype, self.device = dtype, device
        scale = 16 if tiny else 1
        wide = 4 if device.type == "cuda" else 1  # a GPU is filled by larger ones only
        self.candidates = {
            "matmul": [lambda n=n * wide // scale: self.matmul(n) for n in (1024, 2048)],
            "convolution": [
                lambda c=c // scale, size=size, layout=layout: self.convolution(4 * wide**2, c, size, layout)
                for c, size in ((128, 64 // scale), (256, 32 // scale), (512, 16 // scale))
                for layout in (torch.channels_last, torch.contiguous_format)
            ],
        }  # fmt: skip
        self.best = {}

    def matmul(self, n: int) -> tuple[Callable, int]:
        a, b = (torch.randn(n, n, device=self.device, dtype=self.dtype) for _ in range(2))
        return lambda: a @ b, 2 * n**3

    def convolution(self, batch: int, channels: int, size: int, layout: torch.memory_format) -> tuple[Callable, int]:
        """3 x 3, as many channels out as in."""
        x = torch.randn(batch, channels, size, size, device=self.device, dtype=self.dtype)
        weight = torch.randn(channels, channels, 3, 3, device=self.device, dtype=self.dtype)
        x, weight = (tensor.contiguous(memory_format=layout) for tensor in (x, weight))
        return lambda: nn.functional.conv2d(x, weight, padding=1), 2 * batch * size**2 * channels**2 * 9

    def rate(self, make: Callable[[], tuple[Callable, int]]) -> float:
        """FLOPs a second, the best of 5 turns: a ceiling is what the machine can do when nothing disturbs it."""
        work, flops = make()
        work()
        with torch.no_grad():
            return flops / min(seconds_of(work, self.device, 3) for _ in range(5))

    def measure(self) -> dict[str, float]:
        """FLOPs a second of each."""
        for kind, candidates in self.candidates.items():
            if kind not in self.best:
                self.best[kind] = max(candidates, key=self.rate)
        return {kind: self.rate(make) for kind, make in self.best.items()}
