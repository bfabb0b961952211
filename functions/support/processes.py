"""Let the processes of a script work together: one for each GPU under `torchrun`, or a single one.

In training each process computes its shard of every effective batch, and the processes average
their gradients once per optimiser step. Only rank 0 prints and writes files. Outside of `connected`
each process is alone, also in a process group of your own.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Value = TypeVar("Value")
# Whether this process is within `connected`, under torchrun.
is_connected = False


@contextmanager
def connected() -> Iterator[None]:
    """Connect the processes that torchrun has started. Without torchrun there is only one."""
    global is_connected
    if "LOCAL_RANK" not in os.environ:
        yield
        return
    # Tensors on the CPU are exchanged, too.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    is_connected = True
    yield
    is_connected = False
    # After an error torchrun ends the others. To destroy the group then could wait for them.
    dist.destroy_process_group()


def count() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if is_connected else 1


def rank() -> int:
    """Return the number of this process, 0 .. count - 1."""
    return dist.get_rank() if is_connected else 0


def gpu_index() -> int | None:
    """Return the index of this process's GPU, or None: a single process may choose."""
    # It is the rank within this machine.
    return int(os.environ["LOCAL_RANK"]) if is_connected else None


def is_main() -> bool:
    return rank() == 0


def print_main(text: str) -> None:
    """Print a text in rank 0 only."""
    if is_main():
        print(text, flush=True)


def shard(total: int) -> range:
    """Return this process's part of 0 .. total-1. Lengths differ by at most one."""
    return range(rank() * total // count(), (rank() + 1) * total // count())


def batches_of(items: Sequence, batch_size: int) -> list:
    """Split a sequence into batches of at most batch_size."""
    return [items[first : first + batch_size] for first in range(0, len(items), batch_size)]


def wrap(model: nn.Module) -> nn.Module:
    """Return the model to call in training. Its backward averages the processes' gradients."""
    return model if count() == 1 else DistributedDataParallel(model)


def gradient_sync(wrapped: nn.Module, last: bool) -> AbstractContextManager:
    """Return a context for a pass; the processes exchange gradients in a step's `last` one."""
    return nullcontext() if last or count() == 1 else wrapped.no_sync()


def all_reduce(tensor: Tensor) -> Tensor:
    """Add up a tensor over all processes, in place. The host does not wait for a GPU."""
    if count() > 1:
        dist.all_reduce(tensor)
    return tensor


def gathered(value: Value) -> list[Value]:
    """Return the values of all processes, in the order of their ranks."""
    values = [value] * count()
    if count() > 1:
        dist.all_gather_object(values, value)
    return values


def any_rank(flag: bool) -> bool:
    """Return whether a flag is true in any process."""
    # The tensor is on the CPU, so the processes exchange it without waiting for their GPUs.
    return bool(all_reduce(torch.tensor(int(flag))))


def wait() -> None:
    """Wait until all processes have called this."""
    any_rank(False)


def on_main(make: Callable[..., Value], *arguments: Any) -> Value:
    """Call `make` in rank 0 alone, and return its value in all processes, or end them all."""
    if count() == 1:
        return make(*arguments)
    failed_and_value = [True, None]
    # Rank 0 sends the list even if `make` raises an error, so that the others do not wait.
    try:
        if is_main():
            failed_and_value = [False, make(*arguments)]
    finally:
        dist.broadcast_object_list(failed_and_value)
    if failed_and_value[0]:
        # Rank 0 prints its error.
        sys.exit(1)
    return failed_and_value[1]
