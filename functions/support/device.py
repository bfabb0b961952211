"""Device, precision and memory layout: what the hardware really has, asked when a run starts; and Adam on it."""

import ctypes
import os
import platform
from pathlib import Path

import torch
from torch import Tensor

from functions.support.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CPUINFO = Path("/proc/cpuinfo")  # where Linux lists the flags of the CPU
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt, in glibc's malloc.h
CPU_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # x86, x86, 64-bit Arm


def choose_device(name: str = "auto", index: int | None = None) -> torch.device:
    """ "auto" (CUDA, then Apple's MPS, then the CPU) or a device by name, such as "cuda:1"; the process is set for it.

    `index` is the GPU of this process among several, which have one each. Raises UserError when there is no such
    device, or when several processes are given one GPU by its number.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    there = [kind for kind in available if available[kind]]
    try:
        device = torch.device(there[0] if name == "auto" else name)
    except RuntimeError as error:
        raise UserError(f"device is {name!r}; it must be auto, cpu, cuda, cuda:N or mps") from error
    if device.type not in there:
        raise UserError(
            f"device is {name!r}, but PyTorch {torch.__version__} finds only: {', '.join(there)}"
        )
    if device.type == "cuda" and (device.index is not None or index is not None):
        if index is not None and device.index is not None:
            raise UserError(
                f"device is {name!r}, but each of several processes takes its own GPU: give cuda"
            )
        device = torch.device("cuda", index if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise UserError(
                f"device is {str(device)!r}, but there are {torch.cuda.device_count()} CUDA devices"
            )
        # What has no device of its own, such as pinned memory, would go to the first GPU
        torch.cuda.set_device(device)
    if device.type == "cpu":
        keep_heap()
    return device


def keep_heap() -> None:
    """Let this process keep the memory that it frees, with the GNU C library (elsewhere this does nothing).

    By default that library gives large blocks back to the system at once, and all activations are such blocks: then
    every forward pass has its memory zeroed and mapped in again, page by page. With 20 images of 128 x 128 that was a
    fifth of a training step's time, and a third of a sampling step's. With this the peak is some 15% higher.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError, OSError):  # another C library, or Windows
        return
    mallopt(M_MMAP_MAX, 0)  # no block of its own for any request
    mallopt(M_TRIM_THRESHOLD, -1)  # and the heap never shrinks


def choose_precision(
    name: str, device: torch.device, started_with: str | None = None
) -> torch.dtype:
    """The network's dtype under autocast: as named, or with "auto" the fastest that the hardware has natively.

    bfloat16 where the hardware has it (emulated it is several times slower than float32), float16 on older CUDA GPUs
    (with a gradient scaler), float32 elsewhere. A resumed run keeps the precision that it was `started_with`, if the
    device has it. float32 on CUDA is no TF32, for the whole process. UserError when the device has no such precision.
    """
    if device.type == "cuda":
        # Or convolutions have 10 bits of fraction instead of 23
        torch.backends.cudnn.allow_tf32 = False
    there = [known for known in DTYPES if known != "float16" or device.type == "cuda"]
    if started_with in there:
        return DTYPES[started_with]
    if name == "auto" and device.type == "cuda":
        return (
            torch.bfloat16
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float16
        )
    if name == "auto":
        return torch.bfloat16 if device.type == "cpu" and cpu_has_bfloat16() else torch.float32
    if name not in there:
        raise UserError(
            f"precision is {name!r}; on {device.type} it must be auto, {', '.join(there)}"
        )
    return DTYPES[name]


def cpu_has_bfloat16() -> bool:
    """Whether this CPU has native bfloat16 instructions; where Linux does not say so, float32 is the safe answer."""
    return not CPU_BF16_FLAGS.isdisjoint(cpu_info("flags", "Features").split())


def cpu_name() -> str:
    """The CPU's model, where Linux says it, or its architecture."""
    return cpu_info("model name") or platform.machine()


def cpu_info(*names: str) -> str:
    """What Linux says of the first CPU under one of these names; empty on other systems."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith(names)]
    return found[0] if found else ""


def fast_layout(device: torch.device) -> torch.memory_format:
    """The memory layout in which convolutions were measured faster: benchmarks/NOTES.md."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def set_deterministic(deterministic: bool) -> None:
    """With True PyTorch takes only kernels that give the same bits every time, and raises where it has none.

    With False cuDNN tries its kernels for every shape, and takes the fastest.
    """
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS wants for that
    torch.use_deterministic_algorithms(deterministic)


def arithmetic(
    device: torch.device, precision: torch.dtype, processes: int, batch_size: int
) -> dict[str, str | int]:
    """All that decides in which order and precision numbers are added, beside the code: plain values for a checkpoint.

    A resumed run is bit for bit the one that was not stopped only where all of these are the same.
    """
    on_cpu = device.type == "cpu"
    processor = (
        f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}" if on_cpu else device.type
    )
    return {
        "precision": str(precision).removeprefix("torch."),
        "memory_format": str(fast_layout(device)).removeprefix("torch."),
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else processor,
        "threads": torch.get_num_threads() if on_cpu else 0,
        "processes": processes,
        "batch_size": batch_size,
        "torch": str(torch.__version__),  # which is no plain string
    }


def is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Whether PyTorch, or Python, could not have the memory that it asked for."""
    # cuBLAS says ALLOC_FAILED, cuDNN ALLOCATION_FAILED, and oneDNN, which convolves on the CPU, no more than the last
    texts = (
        "can't allocate memory",
        "not enough memory",
        "out of memory",
        "ALLOC_FAILED",
        "ALLOCATION_FAILED",
        "could not create a primitive",
    )
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        text in str(error) for text in texts
    )


class Adam(torch.optim.Adam):
    """PyTorch's fused Adam (Kingma and Ba 2015, arXiv:1412.6980), fast for weights in any memory layout.

    On the CPU its kernel wants contiguous tensors and copies others there and back, in every step: for convolutions in
    channels_last that took longer than Adam itself. So it gets views in the order of the memory. What it does to each
    number does not depend on where the number stands.

    With `found_inf`, a tensor, at 1 a step changes nothing. Apple's kernel does not look at it, so there the host does.
    """

    def step(self, closure: None = None) -> None:
        """One step; waits for the device on MPS."""
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None or found_inf.device.type != "mps" or not found_inf:
            super().step()

    def _init_group(self, group: dict, *lists: list[Tensor]) -> bool:
        """Fill the lists of parameters, gradients, moments and step counts that the kernel is called with."""
        result = super()._init_group(group, *lists)
        for tensors in lists:
            for i, tensor in enumerate(tensors):
                if tensor.is_contiguous(memory_format=torch.channels_last):
                    tensors[i] = tensor.permute(0, 2, 3, 1)
        return result
