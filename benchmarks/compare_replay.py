"""A network's own convolutions and matrix products, run alone: what a training step would take without all else.

Recorded in one forward and backward pass by shape, strides and dtype; then each distinct call is run on random tensors
of that kind, and its time multiplied by how often it came.
"""

import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.compare_measures import CPU_ATTENTION, seconds_of


@dataclass(frozen=True)
class TensorKind:
    """All of a tensor that decides how long an operation on it takes."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(tensor: Tensor) -> "TensorKind":
        return TensorKind(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)

    def random(self, device: torch.device) -> Tensor:
        reach = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        random = self.dtype.is_floating_point
        numbers = torch.randn(reach, device=device) if random else torch.zeros(reach, device=device)
        return numbers.to(self.dtype).as_strided(self.shape, self.strides)


@dataclass(frozen=True)
class Call:
    """An operator and its arguments, tensors by their kind."""

    operator: Callable
    arguments: tuple
    keywords: tuple[tuple[str, object], ...]

    def ready(self, device: torch.device) -> Callable[[], object]:
        """The call on fresh random tensors."""
        arguments = [thawed(value, device) for value in self.arguments]
        keywords = {name: thawed(value, device) for name, value in self.keywords}
        return lambda: self.operator(*arguments, **keywords)


def frozen(value: object) -> object:
    """An argument as something that can be compared and counted."""
    if isinstance(value, Tensor):
        return TensorKind.of(value)
    return tuple(map(frozen, value)) if isinstance(value, (list, tuple)) else value


def thawed(value: object, device: torch.device) -> object:
    """The way back, with random tensors."""
    if isinstance(value, TensorKind):
        return value.random(device)
    return [thawed(item, device) for item in value] if isinstance(value, tuple) else value


class Recorder(TorchDispatchMode):
    """Counts the calls of every operator whose FLOPs are counted: convolutions, matrix products, attention."""

    def __init__(self):
        super().__init__()
        self.calls: Counter[Call] = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = getattr(operator, "_overloadpacket", None)
        if packet in flop_registry or packet in CPU_ATTENTION:
            self.calls[Call(operator, frozen(args), tuple((name, frozen(v)) for name, v in kwargs.items()))] += 1
        return operator(*args, **kwargs)


def recorded(work: Callable[[], object]) -> Counter[Call]:
    """The distinct calls in `work()`, and how often each came."""
    with Recorder() as recorder:
        work()
    return recorder.calls


def replay(calls: Counter[Call], device: torch.device, turns: int = 3) -> float:
    """Seconds that all the calls take alone: for each distinct one the median of some turns, times its count."""
    total, in_a_row = 0.0, 10 if device.type == "cuda" else 1
    with torch.no_grad():
        for call, count in calls.items():
            run = call.ready(device)
            run()
            total += count * statistics.median(seconds_of(run, device, in_a_row) for _ in range(turns))
    return total
