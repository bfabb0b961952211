"""Let the processes of a script work together: one for each GPU under `torchrun`, or a single one.

In training each process computes its shard of every effective batch, and the processes average
their gradients once per optimiser step. Only rank 0 prints and writes files.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Value = TypeVar("Value")


@dataclass(frozen=True)
class Processes:
    """This process's rank, and the collective operations, which are local in a single process."""

    rank: int = 0  # 0 .. count-1
    count: int = 1
    # The rank within this machine is also the index of this process's GPU. A single process may
    # choose.
    local_rank: int | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def print_main(self, text: str) -> None:
        """Print a text in rank 0 only."""
        if self.is_main:
            print(text, flush=True)

    def shard(self, total: int) -> range:
        """Return this process's part of 0 .. total-1. Lengths differ by at most one."""
        start = self.rank * total // self.count
        end = (self.rank + 1) * total // self.count
        return range(start, end)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model to call in training. Its backward averages the processes' gradients."""
        return model if self.count == 1 else DistributedDataParallel(model)

    def gradient_sync(self, wrapped: nn.Module, last: bool) -> AbstractContextManager:
        """Return a context for a pass; the processes exchange gradients in a step's `last` one."""
        return nullcontext() if last or self.count == 1 else wrapped.no_sync()

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all processes, in place. The host does not wait for a GPU."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Return whether a flag is true in any process."""
        # The tensor is on the CPU, so the processes exchange it without waiting for their GPUs.
        return bool(self.sum_(torch.tensor(int(flag))))

    def wait(self) -> None:
        """Wait until all processes have called this."""
        self.any(False)

    def on_main(self, make: Callable[..., Value], *arguments: Any) -> Value:
        """Call `make` in rank 0 alone, and return its value in all processes, or end them all."""
        if self.count == 1:
            return make(*arguments)
        failed_and_value = [True, None]
        # Rank 0 sends the list even if `make` raises an error, so that the others do not wait.
        try:
            if self.is_main:
                failed_and_value = [False, make(*arguments)]
        finally:
            dist.broadcast_object_list(failed_and_value)
        if failed_and_value[0]:
            # Rank 0 prints its error.
            sys.exit(1)
        return failed_and_value[1]


SINGLE_PROCESS = Processes()


@contextmanager
def distributed() -> Iterator[Processes]:
    """Connect the processes that torchrun has started. Without torchrun there is only one."""
    if "LOCAL_RANK" not in os.environ:
        yield SINGLE_PROCESS
        return
    # Tensors on the CPU are exchanged, too.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend)
    yield Processes(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]))
    # After an error torchrun ends the others. To destroy the group then could wait for them.
    dist.destroy_process_group()
