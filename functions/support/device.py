"""Choose the device, precision and memory layout for the hardware, when a script starts."""

import ctypes
import os
import platform
from contextlib import suppress
from pathlib import Path

import torch

from functions.support.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Linux lists the CPU's name and flags in this file.
CPUINFO = Path("/proc/cpuinfo")
# These are two options of mallopt, as numbered in glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
# The first two flags are x86's, and the last one is 64-bit Arm's.
CPU_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


def choose_device(name: str = "auto", index: int | None = None) -> torch.device:
    """Return the device to compute on, and set up this process for it.

    `name` is "auto" (CUDA, then Apple's MPS, then the CPU) or a device such as "cuda:1". With
    several processes, `index` is the index of this process's GPU. Raises UserError when there is
    no such device, or when `name` gives several processes the same GPU.
    """
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    try:
        device = torch.device(available[0] if name == "auto" else name)
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
                f"device is {name!r}, but with several processes each uses its own GPU: give cuda"
            )
        device = torch.device("cuda", index)
    if device.type == "cuda" and device.index is not None:
        count = torch.cuda.device_count()
        if device.index >= count:
            raise UserError(f"device is {str(device)!r}, but there are {count} CUDA devices")
        # Calls that name no device, such as those for pinned memory, would otherwise use the first
        # GPU.
        torch.cuda.set_device(device)
    if device.type == "cpu":
        keep_heap()
    return device


def keep_heap() -> None:
    """Let this process keep the memory that it frees, if it uses the GNU C library."""
    # By default the GNU C library returns a large block, such as an activation, to the system as
    # soon as it is freed. So in every forward pass the system zeroes and maps this memory again,
    # page by page. With 20 images of 128 x 128 that took a fifth of a training step's time, and a
    # third of a sampling step's. The small images of `faces` gain less (measured 2026-11-27):
    # without the options below a sampling step takes 1.12 times as long with 16 images and 1.24
    # times as long with 64, and training steps are not affected. The first option makes malloc take
    # all blocks from the heap, and the second keeps the heap from shrinking. Together they raise
    # peak memory by up to 15%. Other C libraries lack mallopt, and on Windows `CDLL(None)` raises
    # an error.
    with suppress(AttributeError, TypeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def choose_precision(name: str, device: torch.device, previous: str | None = None) -> torch.dtype:
    """Return the network's dtype under autocast: the named one, or for "auto" the fastest one.

    The fastest one is bfloat16 if the hardware supports it, float16 (with a gradient scaler) on
    older CUDA GPUs, and float32 otherwise. With "auto" a resumed run keeps its `previous`
    precision, if the device supports it. On CUDA this function turns TF32 off for the whole
    process. Raises UserError when the device does not support the named precision.
    """
    available = list(DTYPES)
    if device.type != "cuda":
        available.remove("float16")
    else:
        # In TF32 the inputs of convolutions have 10 mantissa bits instead of float32's 23.
        torch.backends.cudnn.allow_tf32 = False
        # A T4 or a V100 emulates bfloat16, which is several times slower than float32.
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            available.remove("bfloat16")

    if name == "auto" and previous in available:
        return DTYPES[previous]
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
    """Return whether this CPU has native bfloat16 instructions, as far as Linux lists them."""
    # Other systems list no flags, so there float32 is the safe choice.
    flags = first_value(CPUINFO, "flags", "Features").split()
    return not CPU_BF16_FLAGS.isdisjoint(flags)


def cpu_name() -> str:
    """Return the CPU's model on Linux, or its architecture if the model is unknown."""
    return first_value(CPUINFO, "model name") or platform.machine()


def first_value(file: Path, *names: str) -> str:
    """Return the first value for one of these names in a file under /proc, or "" if none exists."""
    if file.exists():
        for line in file.read_text().splitlines():
            if line.startswith(names):
                return line.partition(":")[2].strip()
    return ""


def fast_layout(device: torch.device) -> torch.memory_format:
    """Return the memory layout in which convolutions are faster (see benchmarks/NOTES.md)."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def set_deterministic(deterministic: bool) -> None:
    """Make PyTorch use only deterministic kernels, or let it use the fastest kernels.

    With True, PyTorch raises an error for an operation that has no deterministic kernel.
    """
    # With `benchmark`, cuDNN times its kernels for every shape and uses the fastest.
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        # cuBLAS is deterministic only with a workspace of a fixed size.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)


def arithmetic(
    device: torch.device, precision: torch.dtype, processes: int, batch_size: int
) -> dict[str, str | int]:
    """Return the settings on which the order and the precision of sums depend, as plain values.

    A resumed run equals an uninterrupted one bit for bit only if all of these values are the same.
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
        # The version is a subclass of str, and JSON needs a plain string.
        "torch": str(torch.__version__),
    }


def is_out_of_memory(error: Exception) -> bool:
    """Return whether PyTorch or Python failed to allocate memory."""
    # cuBLAS reports ALLOC_FAILED, and cuDNN reports ALLOCATION_FAILED. The last string is the whole
    # message of oneDNN, which computes convolutions on the CPU.
    strings = (
        "can't allocate memory",
        "not enough memory",
        "out of memory",
        "ALLOC_FAILED",
        "ALLOCATION_FAILED",
        "could not create a primitive",
    )
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(s in str(error) for s in strings)


def is_device_failure(error: Exception) -> bool:
    """Return whether it is a failure of a GPU or its driver; a second attempt may succeed."""
    # These strings occur in CUDA's messages. Errors caused by a bug, such as an illegal memory
    # access, have other messages.
    strings = (
        "ECC error",
        "NVLink error",
        "hardware",
        "unspecified launch failure",
        "unknown error",
        "busy or unavailable",
    )
    return isinstance(error, torch.AcceleratorError) and any(s in str(error) for s in strings)
