"""The processes of a script: as many as `torchrun` started, one a GPU, or a single one.

In training each works on its own places of every effective batch, and gradients are summed once per optimiser step.
Rank 0 alone prints and writes files.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from functions.support.errors import UserError
from functions.support.files import short

Value = TypeVar("Value")
# With one that prepares data or has more to sample; one that has ended is noticed at once
PATIENCE = timedelta(days=1)
EXIT_WITH_MAIN = 2  # of processes that end because rank 0 said why it does


@dataclass(frozen=True)
class Processes:
    """Which of them this process is, and what they do together; with one process nothing is sent."""

    rank: int = 0  # 0 .. count-1
    count: int = 1
    local_rank: int = 0  # among those of the same machine: the number of its GPU
    parent: int = 0  # torchrun's process

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def orphaned(self) -> bool:
        """Whether torchrun has ended without ending this: it was killed, or got a signal that it does not know."""
        return self.count > 1 and os.getppid() != self.parent

    def say(self, text: str) -> None:
        """Print, in rank 0."""
        if self.is_main:
            print(text, flush=True)

    def own_range(self, total: int) -> range:
        """This process's part of 0 .. total-1: the parts are contiguous, and differ by at most one in length."""
        return range(self.rank * total // self.count, (self.rank + 1) * total // self.count)

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model to call in training: its backward pass averages gradients over all processes."""
        if self.count == 1:
            return model
        # Which DDP moves into its buckets; None would be made anew beside them
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        return DistributedDataParallel(
            model, None if device.type == "cpu" else [device], gradient_as_bucket_view=True
        )

    def accumulating(self, wrapped: nn.Module, last: bool) -> AbstractContextManager:
        """Around forward and backward: gradients are exchanged in a step's last pass alone."""
        return nullcontext() if last or self.count == 1 else wrapped.no_sync()

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all processes, in place; the host does not wait for a GPU."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether it is true in any process. Between hosts, beside the GPU's work, so that it costs no waiting."""
        return bool(self.sum_(torch.tensor(int(flag))))

    def gather(self, value: Value) -> list[Value]:
        """Every process's value, by rank."""
        values = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        return values

    def from_main(self, make: Callable[[], Value]) -> Value:
        """What `make` returns in rank 0, where alone it runs. When it fails there, the others end without a word."""
        if self.count == 1:
            return make()
        failed_and_value = [True, None]
        try:
            if self.is_main:
                failed_and_value = [False, make()]
        finally:
            dist.broadcast_object_list(failed_and_value)
        if failed_and_value[0]:
            sys.exit(EXIT_WITH_MAIN)
        return failed_and_value[1]


SINGLE_PROCESS = Processes()


@contextmanager
def joined() -> Iterator[Processes]:
    """Meet the other processes that torchrun has started; without it there is one. UserError when another has ended."""
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():
        yield SINGLE_PROCESS
        return
    rank, count, local_rank = (
        int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    )
    try:
        on_gpus = torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"process {rank} cannot meet the others: {short(error)}") from error
    try:
        yield Processes(rank, count, local_rank, os.getppid())
    except SystemExit:  # all were stopped, or end with rank 0
        dist.destroy_process_group()
        raise
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        raise UserError(
            f"another process has ended, so process {rank} does too ({short(error)})"
        ) from error
    dist.destroy_process_group()  # not after an error: it would wait for the others
