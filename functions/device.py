"""Device, precision and memory layout: what the hardware really has, asked when a run starts."""

from contextlib import AbstractContextManager
from pathlib import Path

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CPUINFO = Path("/proc/cpuinfo")  # where Linux lists the flags of the CPU
CPU_BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")  # x86, x86, 64-bit Arm


class DeviceError(ValueError):
    """The device or precision asked for is not there; the message says what is."""


def choose_device(name: str = "auto") -> torch.device:
    """ "auto" (CUDA, then Apple's MPS, then the CPU) or a device by name, such as "cuda:1".

    Raises:
        DeviceError: there is no such device.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"device is {name!r}; it must be auto, cpu, cuda, cuda:N or mps") from error
    if not available.get(device.type):
        there = ", ".join(kind for kind, there in available.items() if there)
        raise DeviceError(f"device is {name!r}, but PyTorch {torch.__version__} finds only: {there}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"device is {name!r}, but there are {torch.cuda.device_count()} CUDA devices, from cuda:0")
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The network's dtype under autocast: as named, or with "auto" the fastest that the hardware has natively.

    bfloat16 where the hardware has it, float16 on older CUDA GPUs (with a gradient scaler), float32 elsewhere. An
    emulated bfloat16 would run, several times slower than float32, so emulation does not count.

    Raises:
        DeviceError: unknown name, or float16 on a device where it is not trained in.
    """
    if name == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
            return torch.bfloat16 if native else torch.float16
        return torch.bfloat16 if device.type == "cpu" and cpu_has_bfloat16() else torch.float32
    if name not in DTYPES:
        raise DeviceError(f"precision is {name!r}; it must be auto, {', '.join(DTYPES)}")
    if name == "float16" and device.type != "cuda":
        raise DeviceError(f"precision is float16, which is for CUDA; on {device.type} use auto, bfloat16 or float32")
    return DTYPES[name]


def cpu_has_bfloat16() -> bool:
    """Whether this CPU has native bfloat16 instructions, by the flags that the Linux kernel lists."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:  # not Linux: float32 is the safe answer
        return False
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "").split()
    return any(flag in flags for flag in CPU_BF16_FLAGS)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Run the network's matrix products in `dtype`; in float32 this does nothing."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def choose_memory_format(device: torch.device) -> torch.memory_format:
    """The layout to train in: channels_last on CUDA; on 2 CPU cores it was no faster (9.4 against 9.2 ms an image)."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format
