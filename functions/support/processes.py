"""Let the processes of a script work together: one for each GPU under `torchrun`, or a single one.

In training each process computes its shard of every effective batch, and the processes average
their gradients once per optimiser step. Rank 0 alone prints and writes files.
"""

import gc
import os
import signal
import sys
import traceback
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
# Processes wait for this time for one that prepares data or has more images to sample. When one
# ends, its connections close, and the others notice that at once.
TIMEOUT = timedelta(days=1)
# In training the timeout is shorter. A machine that hangs or vanishes does not close connections.
TRAINING_TIMEOUT = timedelta(minutes=30)
# The errors of Gloo, NCCL and the store have one of these texts when another process has ended or
# does not answer.
CONNECTION_LOST = (
    "connection closed",
    "connection was likely closed",
    "connection reset",
    "broken pipe",
    "timed out waiting",
)
# The other processes exit with this status when rank 0 ends with an error, which it prints.
EXIT_WITH_MAIN = 2


@dataclass(frozen=True)
class Processes:
    """Hold this process's rank, and do the collective operations of all processes.

    A single process communicates with none.
    """

    rank: int = 0  # 0 .. count-1
    count: int = 1
    # This is the rank among the processes of the same machine, and the number of this one's GPU.
    local_rank: int = 0
    # This is torchrun's process id.
    parent: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def orphaned(self) -> bool:
        """Return whether torchrun has ended without ending this process."""
        # That happens when torchrun is killed, or gets a signal that it does not handle.
        return self.count > 1 and os.getppid() != self.parent

    def print_main(self, text: str) -> None:
        """Print a text in rank 0, and nothing in the others."""
        if self.is_main:
            print(text, flush=True)

    def shard(self, total: int) -> range:
        """Return this process's shard of 0 .. total-1.

        The shards are contiguous, and their lengths differ by at most one.
        """
        start = self.rank * total // self.count
        end = (self.rank + 1) * total // self.count
        return range(start, end)

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Return the model to call in training.

        Its backward pass averages gradients over all processes.
        """
        if self.count == 1:
            return model
        # DDP moves existing gradients into its buckets. Without these zeros the gradients would
        # take memory in addition to the buckets.
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        devices = None if device.type == "cpu" else [device]
        return DistributedDataParallel(model, devices, gradient_as_bucket_view=True)

    def accumulating(self, wrapped: nn.Module, last: bool) -> AbstractContextManager:
        """Return a context for a forward and a backward pass.

        In this context the processes exchange gradients only in the last pass of a step.
        """
        return nullcontext() if last or self.count == 1 else wrapped.no_sync()

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all processes, in place. The host does not wait for a GPU."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Return whether a flag is true in any process."""
        # The tensor is on the CPU, so the hosts exchange it without waiting for their GPUs.
        total = self.sum_(torch.tensor(int(flag)))
        return bool(total)

    def shorten_timeout(self) -> None:
        """Set the timeout of later operations to TRAINING_TIMEOUT."""
        if self.count > 1:
            # PyTorch has no public function for this, but has had this private one for years.
            dist.distributed_c10d._set_pg_timeout(TRAINING_TIMEOUT)

    def gather(self, value: Value) -> list[Value]:
        """Return the values of all processes, in the order of their ranks."""
        values = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        return values

    def on_main(self, make: Callable[[], Value]) -> Value:
        """Call `make` in rank 0 alone, and return its value in all processes.

        When `make` raises an error, the other processes exit and print nothing.
        """
        if self.count == 1:
            return make()
        failed_and_value = [True, None]
        # Rank 0 sends the list even when `make` raises an error.
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
def distributed() -> Iterator[Processes]:
    """Connect the processes that torchrun has started. Without torchrun there is a single one.

    Raises UserError when they cannot connect, or when another process has ended or does not answer.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if not set(names) <= os.environ.keys():
        yield SINGLE_PROCESS
        return
    rank, count, local_rank = (int(os.environ[name]) for name in names)
    try:
        on_gpus = torch.cuda.is_available() and dist.is_nccl_available()
        backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"process {rank} cannot connect to the others: {short(error)}") from error

    # Rank 0 alone prints "interrupted". The system ends the others, even while they wait for it.
    if rank > 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield Processes(rank, count, local_rank, os.getppid())
    except BaseException as error:
        clear_frames(error)
        # After SystemExit all processes end: they were stopped, or end with rank 0.
        if isinstance(error, SystemExit):
            leave_group()
        # After other errors the group stays, because destroying it would wait for the others.
        reason = str(error).lower()
        lost = any(text in reason for text in CONNECTION_LOST)
        if not isinstance(error, RuntimeError) or not lost:
            raise
        raise UserError(
            f"another process has ended or does not answer, so process {rank} ends ({short(error)})"
        ) from error
    leave_group()


def clear_frames(error: BaseException | None) -> None:
    """Free the local variables in an error's traceback, such as the network that DDP wrapped.

    If DDP held the last reference to the process group, its destructor would wait for the group's
    threads while it holds Python's global lock, which these threads may need.
    """
    while error:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
    gc.collect()


def leave_group() -> None:
    """Destroy the process group, after all objects that use it."""
    # Reference cycles may still hold DDP (see `clear_frames`).
    gc.collect()
    dist.destroy_process_group()
