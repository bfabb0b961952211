"""Device, precision and memory layout: what the hardware really has, asked when a run starts.

Here is Adam, too, as it depends on the device.
"""

import ctypes
import os
import platform
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from functions.support.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Linux lists the flags of the CPU here, and says how much memory there is.
CPUINFO = Path("/proc/cpuinfo")
MEMINFO = Path("/proc/meminfo")
# It says here how much of it this process has. Who writes a 5 there sets the peak back.
PROCESS = Path("/proc/self/status")
RESET_PEAK = Path("/proc/self/clear_refs")
# The numbers of two options of mallopt are in glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
# The first two are flags of x86, and the last one is of 64-bit Arm.
CPU_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


def choose_device(name: str = "auto", index: int | None = None) -> torch.device:
    """Return the device to compute on, and set this process up for it.

    `name` is "auto" (CUDA, then Apple's MPS, then the CPU) or a device such as "cuda:1". `index`
    is the GPU of this process among several, which have one each. Raises UserError when there is
    no such device, or when several processes are given one GPU by its number.
    """
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    wanted = available[0] if name == "auto" else name
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise UserError(f"device is {name!r}; it must be auto, cpu, cuda, cuda:N or mps") from error
    if device.type not in available:
        raise UserError(
            f"device is {name!r}, but PyTorch {torch.__version__} finds only: "
            f"{', '.join(available)}"
        )

    if device.type == "cuda" and index is not None:
        if device.index is not None:
            raise UserError(
                f"device is {name!r}, but each of several processes takes its own GPU: give cuda"
            )
        device = torch.device("cuda", index)
    if device.type == "cuda" and device.index is not None:
        count = torch.cuda.device_count()
        if device.index >= count:
            raise UserError(f"device is {str(device)!r}, but there are {count} CUDA devices")
        # Otherwise what has no device of its own, such as pinned memory, goes to the first GPU.
        torch.cuda.set_device(device)
    if device.type == "cpu":
        keep_heap()
    return device


def keep_heap() -> None:
    """Let this process keep the memory that it frees, if it has the GNU C library."""
    # By default the GNU C library gives large blocks back to the system at once, and all
    # activations are such blocks. Then every forward pass has its memory zeroed and mapped in
    # again, page by page. With 20 images of 128 x 128 that took a fifth of a training step's time,
    # and a third of a sampling step's. In `faces` (2026-11-27) a sampling step took 1.12 times as
    # long with 16 images, and 1.24 times with 64; a training step did not. So no request gets a
    # block of its own, and the heap never shrinks. The peak of memory is up to 15% higher for it.
    # Another C library has no mallopt, and Windows has none of them.
    with suppress(AttributeError, TypeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def choose_precision(
    name: str, device: torch.device, started_with: str | None = None
) -> torch.dtype:
    """Return the network's dtype under autocast: as named, or with "auto" the fastest native one.

    That is bfloat16 where the hardware has it, float16 (with a gradient scaler) on older CUDA
    GPUs, and float32 elsewhere. With "auto" a resumed run keeps the precision that it was
    `started_with`, if the device has it. On CUDA this turns TF32 off for the whole process.
    Raises UserError when the device has no such precision.
    """
    available = list(DTYPES)
    if device.type != "cuda":
        available.remove("float16")
    else:
        # TF32 would give convolutions 10 bits of fraction instead of the 23 of float32.
        torch.backends.cudnn.allow_tf32 = False
        # Emulated bfloat16, as a T4 or a V100 has it, is several times slower than float32.
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            available.remove("bfloat16")

    if name == "auto" and started_with in available:
        return DTYPES[started_with]
    if name in available:
        return DTYPES[name]
    if name != "auto":
        raise UserError(
            f"precision is {name!r}; on {device.type} it must be auto, {', '.join(available)}"
        )
    if device.type == "cuda":
        return torch.bfloat16 if "bfloat16" in available else torch.float16
    native = device.type == "cpu" and cpu_has_bfloat16()
    return torch.bfloat16 if native else torch.float32


def cpu_has_bfloat16() -> bool:
    """Return whether Linux says that this CPU has native bfloat16 instructions."""
    # The flags are empty where Linux does not say so, and then float32 is the safe answer.
    flags = first_value(CPUINFO, "flags", "Features").split()
    return not CPU_BF16_FLAGS.isdisjoint(flags)


def room_on_the_cpu(compute_one: Callable[[], object]) -> int:
    """Return how many images may be computed at a time, where `compute_one()` computes one.

    Linux lets a process have more memory than there is, and kills it later. Elsewhere too large an
    allocation raises, and nothing is bounded here.
    """
    with suppress(AttributeError, TypeError):
        # The GNU C library gives back what `keep_heap` kept, so all that one image takes is seen.
        ctypes.CDLL(None).malloc_trim(0)
    try:
        RESET_PEAK.write_text("5")
    except OSError:
        # This is not Linux.
        return sys.maxsize
    free = kilobytes(MEMINFO, "MemAvailable")
    before = kilobytes(PROCESS, "VmRSS")
    compute_one()
    taken = kilobytes(PROCESS, "VmHWM") - before
    # Many images at a time leave gaps in the heap, so they get half of what is free.
    return max(free // 2 // max(taken, 1), 1)


def kilobytes(file: Path, name: str) -> int:
    """Return a number of one of Linux's files about memory."""
    return int(first_value(file, name).removesuffix(" kB"))


def cpu_name() -> str:
    """Return the CPU's model, where Linux says it, or its architecture."""
    return first_value(CPUINFO, "model name") or platform.machine()


def first_value(file: Path, *names: str) -> str:
    """Return what a file of Linux says first under one of these names; "" on other systems."""
    if file.exists():
        for line in file.read_text().splitlines():
            if line.startswith(names):
                return line.partition(":")[2].strip()
    return ""


def fast_layout(device: torch.device) -> torch.memory_format:
    """Return the memory layout in which convolutions are faster, as measured.

    benchmarks/NOTES.md has the measurements.
    """
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def set_deterministic(deterministic: bool) -> None:
    """Let PyTorch take only kernels that give the same bits every time, or the fastest ones.

    With True PyTorch raises where it has no such kernel.
    """
    # With benchmark, cuDNN tries its kernels for every shape and takes the fastest.
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        # cuBLAS needs a workspace of a fixed size for that.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)


def arithmetic(
    device: torch.device, precision: torch.dtype, processes: int, batch_size: int
) -> dict[str, str | int]:
    """Return, as plain values, all beside the code that decides how numbers are added.

    Order and precision of sums depend on it. A resumed run is bit for bit the one that was not
    stopped only where all of these values are the same.
    """
    processor = device.type
    threads = 0
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    if device.type == "cpu":
        processor = f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}"
        threads = torch.get_num_threads()
    return {
        "precision": str(precision).removeprefix("torch."),
        "memory_format": str(fast_layout(device)).removeprefix("torch."),
        "processor": processor,
        "threads": threads,
        "processes": processes,
        "batch_size": batch_size,
        # The version is a subclass of str, and JSON is to hold a plain string.
        "torch": str(torch.__version__),
    }


def is_out_of_memory(error: Exception) -> bool:
    """Return whether PyTorch, or Python, could not have the memory that it asked for."""
    # cuBLAS says ALLOC_FAILED and cuDNN ALLOCATION_FAILED. oneDNN, which convolves on the CPU,
    # says no more than the last of these texts.
    texts = (
        "can't allocate memory",
        "not enough memory",
        "out of memory",
        "ALLOC_FAILED",
        "ALLOCATION_FAILED",
        "could not create a primitive",
    )
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def is_device_failure(error: Exception) -> bool:
    """Return whether a GPU or its driver has failed, so that another try may succeed."""
    # These are parts of CUDA's texts. Errors that a bug causes, such as an illegal memory access,
    # have others.
    texts = (
        "ECC error",
        "NVLink error",
        "hardware",
        "unspecified launch failure",
        "unknown error",
        "busy or unavailable",
    )
    return isinstance(error, torch.AcceleratorError) and any(text in str(error) for text in texts)


class Adam(torch.optim.Adam):
    """Run PyTorch's Adam (Kingma and Ba 2015, arXiv:1412.6980), with `found_inf` on MPS too.

    With `found_inf`, a tensor, at 1 a step of fused Adam changes nothing.
    """

    def step(self, closure: None = None) -> None:
        """Make one step; this waits for the device on MPS."""
        found_inf = getattr(self, "found_inf", None)
        # Apple's kernel does not look at found_inf, so on MPS the host does.
        if found_inf is None or found_inf.device.type != "mps" or not found_inf:
            super().step()
