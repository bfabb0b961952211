"""Choose the device, precision and memory layout for the hardware, when a script starts."""

import ctypes
import os
import platform
import re
from contextlib import suppress
from pathlib import Path

import torch

from functions.support import processes
from functions.support.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# PyTorch compiles for CPUs, too, but there the network would not be faster.
COMPILED_DEVICES = ("cuda",)
# Linux lists the CPU's name and flags in this file.
CPUINFO = Path("/proc/cpuinfo")
# These are two options of mallopt, as numbered in glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
# The first two flags are x86's, and the last one is 64-bit Arm's.
CPU_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


def choose_device(name: str) -> torch.device:
    """Return the device to compute on, and set up this process for it.

    `name` is "auto" (CUDA, then Apple's MPS, then the CPU) or a device such as "cuda:1". With
    several processes each has a GPU of its own, whatever index the name has. Raises UserError when
    there is no such device.
    """
    if name == "auto":
        name = "cpu"
        if torch.backends.mps.is_available():
            name = "mps"
        if torch.cuda.is_available():
            name = "cuda"
    try:
        device = torch.device(name)
        index = processes.gpu_index()
        if device.type == "cuda" and index is not None:
            device = torch.device("cuda", index)
        # PyTorch raises an AssertionError if it was built without CUDA.
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device is {name!r}; it must be auto, cpu, cuda, cuda:N or mps, and this machine and "
            "PyTorch must have it"
        ) from error
    if device.type == "cuda" and device.index is not None:
        # Calls that name no device, such as those for pinned memory, would otherwise use the first
        # GPU.
        torch.cuda.set_device(device)
    if device.type == "cpu":
        # This process keeps the memory that it frees, if it uses the GNU C library. By default, a
        # large block, such as an activation, returns to the system as soon as it is freed, and in
        # every forward pass the system zeroes and maps this memory again, page by page
        # (benchmarks/NOTES.md has the times). The first option makes malloc take all blocks from
        # the heap, and the second keeps the heap from shrinking. Other C libraries lack mallopt,
        # and on Windows `CDLL(None)` raises an error.
        with suppress(AttributeError, TypeError, OSError):
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, -1)
    return device


def choose_precision(
    name: str, device: torch.device, previous: str | None = None, otherwise: str | None = None
) -> torch.dtype:
    """Return the network's dtype: the named one, or for "auto" the `previous` one.

    If the device does not compute the previous one natively, or there is none, "auto" is
    `otherwise`, or by default the fastest native one. Raises UserError for float16 without a CUDA
    GPU.
    """
    native = native_precisions(device)
    if name == "auto":
        name = previous if previous in native else otherwise or native[0]
    if name == "float16" and device.type != "cuda":
        raise UserError("precision float16 needs a CUDA GPU; use bfloat16 or float32")
    return DTYPES[name]


def native_precisions(device: torch.device) -> list[str]:
    """Return the precisions that the device has instructions for, the fastest first."""
    if device.type == "cuda":
        native = ["float16", "float32"]
        # A T4 or a V100 emulates bfloat16, which is several times slower than float32.
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = ["float32"]
        has_bfloat16 = device.type == "cpu" and cpu_has_bfloat16()
    return ["bfloat16", *native] if has_bfloat16 else native


def cpu_has_bfloat16() -> bool:
    """Return whether this CPU has native bfloat16 instructions, as far as Linux lists them."""
    # Other systems list no flags, so there float32 is the safe choice.
    return not CPU_BF16_FLAGS.isdisjoint(cpu_info().split())


def cpu_name() -> str:
    """Return the CPU's model on Linux, or its architecture if the model is unknown."""
    model = re.search(r"model name\s*: (.*)", cpu_info())
    return model[1] if model else platform.machine()


def cpu_info() -> str:
    """Return what Linux says about the CPU, or "" on other systems."""
    return CPUINFO.read_text() if CPUINFO.exists() else ""


def fast_layout(device: torch.device) -> torch.memory_format:
    """Return the memory layout in which the network is faster (see benchmarks/NOTES.md)."""
    if device.type in ("cuda", "cpu"):
        return torch.channels_last
    return torch.contiguous_format


def set_deterministic(deterministic: bool) -> None:
    """Make PyTorch use only deterministic kernels, or else raise an error; or let it be fast."""
    # With `benchmark`, cuDNN times its kernels for every shape and uses the fastest.
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        # cuBLAS is deterministic only with a workspace of a fixed size.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # The call takes 2 seconds, because it imports PyTorch's compiler.
    if deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(deterministic)


def arithmetic(device: torch.device, precision: torch.dtype) -> dict[str, str | int]:
    """Return what of the machine the order and the precision of sums depend on, as plain values."""
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
        # The version is a subclass of str, and JSON needs a plain string.
        "torch": str(torch.__version__),
    }
