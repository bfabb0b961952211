"""How much memory a training will take, before it is started, and what fits when it is too much."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from functions.noise_scheduler import NoiseScheduler
from functions.support.device import is_out_of_memory
from functions.support.errors import UserError
from functions.training.pass_memory import peak_of_a_pass

try:
    import resource
except ImportError:  # Windows has no such module; the process itself is then left out of the estimate
    resource = None

STATUS, MEMINFO = Path("/proc/self/status"), Path("/proc/meminfo")  # Linux
CGROUP_LIMITS = [Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory/memory.limit_in_bytes")]  # v2, v1
# Of what the passes take, lost between blocks of the C library's heap as `keep_heap` has it. With this the estimate was
# 8% above to 10% below real peaks on the CPU (1 to 3 GB: batches of 12 and 24, all of `recompute`).
HEAP_GAPS = 0.4

# Of the memory there is, and of the estimate, in which errors as above and the gaps of a GPU's allocator have room
SURELY_TOO_MUCH = 0.85
SAFELY_LESS = 0.8
FLOAT_BYTES = 4  # weights, gradients, Adam's two moments and the EMA are all float32


def training_memory(
    model: nn.Module,
    scheduler: NoiseScheduler,
    effective_batch: int,
    largest_pass: int,
    has_ema: bool,
    precision: torch.dtype,
    device: torch.device,
    baseline: int,
    resident: int = 0,
) -> Callable[[int], dict[str, int]]:
    """An estimate of a training's peak for any batch_size, in bytes, by what takes it; the values add up to the peak.

    On the CPU it is the process's, with the `baseline` that Python and PyTorch took before the model was made; on a GPU
    it is what PyTorch allocates there, the `resident` bytes of images that are kept on it included.
    """
    # The peak is convex in the batch: on a line between two sizes it is never too low.
    low, high = (1, largest_pass) if largest_pass > 1 else (1, 2)
    at_low, at_high = (peak_of_a_pass(model, scheduler, images, precision, device) for images in (low, high))
    passes = lambda batch_size: at_low + (batch_size - low) * (at_high - at_low) // (high - low)
    on_cpu = device.type == "cpu"
    parameters = sum(parameter.numel() for parameter in model.parameters()) * FLOAT_BYTES
    image = model.channels * model.image_size**2 * FLOAT_BYTES
    return lambda batch_size: {
        "weights": parameters,
        "gradients": parameters,
        "Adam": 2 * parameters,
        "EMA": parameters if has_ema else 0,
        "passes": passes(batch_size),
        "gaps in the heap": round(HEAP_GAPS * passes(batch_size)) if on_cpu else 0,
        "noise and images": (effective_batch + 4 * batch_size) * image,
        "data set": resident,
        "Python and PyTorch": baseline if on_cpu else 0,
    }


def process_memory() -> int:
    """The most memory that this process has had, in bytes."""
    if STATUS.exists():
        return kilobytes(STATUS)["VmHWM"]  # ru_maxrss would count what the process had that started this one
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource else 0
    return peak if sys.platform == "darwin" else 1024 * peak


def memory_of(device: torch.device) -> int:
    """Bytes that this process can have on a device in all: what it has now, and what is free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if device.type != "cpu" or not STATUS.exists():  # elsewhere the system does not say: no limit is assumed
        return sys.maxsize
    status, system = kilobytes(STATUS), kilobytes(MEMINFO)
    limits = [status["VmRSS"] + system["MemAvailable"] + system["SwapFree"]]
    for path in CGROUP_LIMITS:
        if path.exists() and path.read_text().strip() != "max":
            limits.append(int(path.read_text()))
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if address_space != resource.RLIM_INFINITY:
        limits.append(status["VmRSS"] + address_space - status["VmSize"])
    return min(limits)


def kilobytes(path: Path) -> dict[str, int]:
    """The amounts of memory in a file of Linux's /proc, in bytes."""
    fields = [line.replace(":", " ").split() for line in path.read_text().splitlines()]
    return {field[0]: 1024 * int(field[1]) for field in fields if field[-1] == "kB"}


@contextmanager
def out_of_memory_explained(
    estimate: Callable[[int], dict[str, int]],
    batch_size: int,
    effective_batch: int,
    device: torch.device,
    processes: int = 1,
) -> Iterator[None]:
    """Turn running out of memory into a `UserError` that says what fits. On the CPU that is foreseen.

    There the system would end the process without a word, when memory that it has promised is not there.

    Args:
        estimate: batch_size -> bytes by what takes them, as from `training_memory`.
        processes: those that share the memory of a CPU; a GPU has one each.
    """
    available = memory_of(device) // (processes if device.type == "cpu" else 1)
    if device.type == "cpu" and SURELY_TOO_MUCH * total(estimate(batch_size)) > available:
        raise UserError(smaller_batch(estimate, batch_size, effective_batch, available))
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        advice = smaller_batch(estimate, batch_size, effective_batch, available)
        raise UserError(f"{advice} ({str(error).splitlines()[0]})") from error


@contextmanager
def weights_must_fit() -> Iterator[None]:
    """The same for all that comes before the first step: there no batch_size helps."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory for weights, their averages and images alone ({str(error).splitlines()[0]}): take a "
            "smaller base_dim, or another device"
        ) from error


def smaller_batch(
    estimate: Callable[[int], dict[str, int]], batch_size: int, effective_batch: int, available: int
) -> str:
    """The advice for a training that does not fit: the batch_size that does, and what keeps the effective batch."""
    needs = {size: total(estimate(size)) for size in range(1, batch_size) if effective_batch % size == 0}
    wanted, least = total(estimate(batch_size)), total(estimate(1))
    text = f"out of memory: batch_size = {batch_size} takes about {gigabytes(wanted)}, and there are "
    text += f"{gigabytes(available)}. "
    fitting = [size for size, need in needs.items() if need <= SAFELY_LESS * available]
    if not fitting:
        return (
            f"{text}Even batch_size = 1 takes about {gigabytes(least)}: take a smaller base_dim or image_size, or "
            "another device"
        )
    size = max(fitting)
    return (
        f"{text}This fits, with about {gigabytes(needs[size])}, and keeps the effective batch of {effective_batch}: "
        f"--diffusion.batch-size {size} --diffusion.gradient-accumulation {effective_batch // size}"
    )


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def total(parts: dict[str, int]) -> int:
    return sum(parts.values())
