"""Let the processes of a script work together: one for each GPU under `torchrun`, or a single one.

In training each process computes its shard of every effective batch, and the processes average
their gradients once per optimiser step. Only rank 0 prints and writes files.
"""

import atexit
import gc
import os
import signal
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
# A process waits this long for another one, which may hang or have lost its machine. When a process
# ends, its connections close, and the others notice that immediately.
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Processes:
    """This process's rank, and the collective operations.

    With a single process, all operations are local.
    """

    rank: int = 0  # 0 .. count-1
    count: int = 1
    # The rank within this machine is also the index of this process's GPU.
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def print_main(self, text: str) -> None:
        """Print a text in rank 0 only."""
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
        """Return the model to call in training. Its backward averages the processes' gradients."""
        if self.count == 1:
            return model
        # DDP moves gradients that exist into its buckets. Without these zeros, gradients would need
        # memory in addition to the buckets.
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        devices = None if device.type == "cpu" else [device]
        return DistributedDataParallel(model, devices, gradient_as_bucket_view=True)

    def gradient_sync(self, wrapped: nn.Module, last: bool) -> AbstractContextManager:
        """Return a context for one forward and backward pass.

        The processes exchange gradients in it only if it is the step's `last` pass.
        """
        return nullcontext() if last or self.count == 1 else wrapped.no_sync()

    def clear_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Free the gradients; of several processes, set them to 0."""
        # DDP's gradients are views of its buckets. If they were set to None, they would be
        # allocated twice.
        optimizer.zero_grad(set_to_none=self.count == 1)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all processes, in place. The host does not wait for a GPU."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Return whether a flag is true in any process."""
        # The tensor is on the CPU, so the processes exchange it without waiting for their GPUs.
        total = self.sum_(torch.tensor(int(flag)))
        return bool(total)

    def wait(self) -> None:
        """Wait until all processes have called this."""
        self.any(False)

    def on_main(self, make: Callable[[], Value]) -> Value:
        """Call `make` only in rank 0, and return its value in all processes.

        When `make` raises an error, the other processes exit and print nothing.
        """
        if self.count == 1:
            return make()
        failed_and_value = [True, None]
        # Rank 0 sends the list even if `make` raises an error, so that the others do not wait.
        try:
            if self.is_main:
                failed_and_value = [False, make()]
        finally:
            dist.broadcast_object_list(failed_and_value)
        if failed_and_value[0]:
            # Rank 0 prints its error.
            sys.exit(1)
        return failed_and_value[1]


SINGLE_PROCESS = Processes()


@contextmanager
def distributed() -> Iterator[Processes]:
    """Connect the processes that torchrun has started. Without torchrun there is only one.

    Raises UserError when one of torchrun's variables is not an integer, and when they cannot
    connect. After any later error in one of them, its exit status is 1, and torchrun ends the
    others.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if not set(names) <= os.environ.keys():
        yield SINGLE_PROCESS
        return
    rank, count, local_rank = map(environment_integer, names)
    # By default each process starts as many compilers as the machine has cores, up to 32. PyTorch
    # reads this when its compiler is imported, so it cannot be set later.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "8")
    try:
        on_gpus = torch.cuda.is_available() and dist.is_nccl_available()
        backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"process {rank} cannot connect to the others: {short(error)}") from error

    # Only rank 0 prints "interrupted". The others get the default handler, so that Ctrl-C ends them
    # even while they wait for rank 0.
    if rank > 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield Processes(rank, count, local_rank)
    except BaseException:
        # To destroy the group could wait for the others, and Python's own end would destroy it at a
        # time when its threads make the process abort or hang.
        atexit.register(end_immediately)
        raise
    # The model of `wrap` may still exist in a reference cycle. If it held the last reference to the
    # group, destroying the model later could deadlock.
    gc.collect()
    dist.destroy_process_group()


def environment_integer(name: str) -> int:
    """Return the integer in an environment variable. Raises UserError if it has another text."""
    text = os.environ[name]
    try:
        return int(text)
    except ValueError:
        raise UserError(
            f"the environment variable {name} is {short(text)!r}, which is not an integer; "
            "unset it, or start with torchrun"
        ) from None


def end_immediately() -> None:
    """End this process without destroying what it has."""
    sys.stdout.flush()
    os._exit(1)
