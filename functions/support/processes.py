"""The processes of a script: as many as `torchrun` started, one for each GPU, or a single one.

In training each process works on its own places of every effective batch, and gradients are
summed once per optimiser step. Rank 0 alone prints and writes files.
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
# Processes wait so long for one that prepares data or has more to sample. They notice at once when
# one has ended.
PATIENCE = timedelta(days=1)
# In training they wait so long for each other. A machine that hangs or vanishes ends no connection.
PATIENCE_IN_TRAINING = timedelta(minutes=30)
# Gloo, NCCL and the store say one of these when the other end of a connection is gone or silent.
LOST = (
    "connection closed",
    "connection was likely closed",
    "connection reset",
    "broken pipe",
    "timed out waiting",
)
# Processes end with this status when rank 0 has said why it ends.
EXIT_WITH_MAIN = 2


@dataclass(frozen=True)
class Processes:
    """Say which of the processes this one is, and do what they do together.

    With one process nothing is sent.
    """

    rank: int = 0  # 0 .. count-1
    count: int = 1
    # This counts the processes of the same machine. It is the number of this process's GPU.
    local_rank: int = 0
    # This is the id of torchrun's process.
    parent: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def orphaned(self) -> bool:
        """Return whether torchrun has ended without ending this process."""
        # That happens when torchrun is killed, or gets a signal that it does not know.
        return self.count > 1 and os.getppid() != self.parent

    def print_main(self, text: str) -> None:
        """Print a text in rank 0, and nothing in the others."""
        if self.is_main:
            print(text, flush=True)

    def shard(self, total: int) -> range:
        """Return this process's part of 0 .. total-1.

        The parts are contiguous, and their lengths differ by at most one.
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
        # DDP moves these gradients into its buckets. Without them it would make others beside the
        # buckets.
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        devices = None if device.type == "cpu" else [device]
        return DistributedDataParallel(model, devices, gradient_as_bucket_view=True)

    def accumulating(self, wrapped: nn.Module, last: bool) -> AbstractContextManager:
        """Return a context for forward and backward.

        It lets processes exchange gradients in a step's last pass alone.
        """
        return nullcontext() if last or self.count == 1 else wrapped.no_sync()

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all processes, in place. The host does not wait for a GPU."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Return whether a flag is true in any process."""
        # The tensor is on the CPU, so the hosts exchange it beside the GPU's work, without waiting.
        total = self.sum_(torch.tensor(int(flag)))
        return bool(total)

    def wait_less(self) -> None:
        """Wait for the others no longer than PATIENCE_IN_TRAINING from now on."""
        if self.count > 1:
            # PyTorch has no public way to this, and has had this one for years.
            dist.distributed_c10d._set_pg_timeout(PATIENCE_IN_TRAINING)

    def gather(self, value: Value) -> list[Value]:
        """Return every process's value, by rank."""
        values = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        return values

    def on_main(self, make: Callable[[], Value]) -> Value:
        """Return what `make` returns in rank 0, where alone it runs.

        When it fails there, the others end without a word.
        """
        if self.count == 1:
            return make()
        failed_and_value = [True, None]
        # The others get the list even when rank 0 leaves with an error.
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
    """Meet the other processes that torchrun has started; without torchrun there is one.

    Raises UserError when they cannot meet, or when another has ended or does not answer.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if not set(names) <= os.environ.keys():
        yield SINGLE_PROCESS
        return
    rank, count, local_rank = (int(os.environ[name]) for name in names)
    try:
        on_gpus = torch.cuda.is_available() and dist.is_nccl_available()
        backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"process {rank} cannot meet the others: {short(error)}") from error

    # Rank 0 alone says that it was interrupted. The others end even while they wait for it.
    if rank > 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield Processes(rank, count, local_rank, os.getppid())
    except BaseException as error:
        forget_frames(error)
        # Here all processes were stopped, or end with rank 0.
        if isinstance(error, SystemExit):
            leave()
        # After other errors the group is not destroyed, as that would wait for the others.
        reason = str(error).lower()
        if not isinstance(error, RuntimeError) or not any(sign in reason for sign in LOST):
            raise
        raise UserError(
            f"another process has ended or does not answer, so process {rank} ends ({short(error)})"
        ) from error
    leave()


def forget_frames(error: BaseException | None) -> None:
    """Free what the functions held that an error has left, as the network that DDP wrapped.

    Were DDP the last to hold the group of processes, it would wait for the group's threads without
    giving them Python's lock, perhaps for ever.
    """
    while error:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
    gc.collect()


def leave() -> None:
    """Destroy the group of processes, after all that still uses it."""
    # What refers to itself still holds DDP: see `forget_frames`.
    gc.collect()
    dist.destroy_process_group()
