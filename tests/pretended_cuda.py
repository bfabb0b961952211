"""A CUDA device that is only pretended, on PyTorch's CPU build.

It needs a process of its own, and must come before any backward pass there. Its tensors have
device, type, shape and layout, and no numbers (they are fake tensors); tensors on the CPU stay
real. Operations on tensors of different devices raise, as do types and layouts that CUDA's kernels
refuse. Every line at which the host waits for the device is counted. All this stands on private
parts of PyTorch.
"""

import contextlib
import ctypes
import traceback
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]
aten = torch.ops.aten
# C++ points to these objects, so Python must not free them.
kept = []


def c_function(result: int) -> int:
    """Return the address of a C function that returns `result`."""
    kept.append(ctypes.CFUNCTYPE(ctypes.c_int)(lambda: result))
    return ctypes.cast(kept[-1], ctypes.c_void_p).value


def library(name: str) -> ctypes.CDLL:
    """Load one of PyTorch's own libraries."""
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))


def let_autograd_know_cuda() -> None:
    """Give autograd the guard and the hooks of CUDA, which it asks for and a CPU build lacks."""
    registry = "_ZN3c104impl26device_guard_impl_registryE"
    guards = (ctypes.c_void_p * 22).in_dll(library("libc10.so"), registry)

    # The guard is first an object all of whose methods return 0; device type 1 is CUDA.
    table = (ctypes.c_void_p * 64)(*[c_function(0)] * 64)
    guard = ctypes.c_void_p(ctypes.addressof(table))
    kept.extend([table, guard])
    guards[1] = ctypes.addressof(guard)
    # This call puts PyTorch's own guard, which does nothing, in its place.
    torch._C._ensureCUDADeviceGuardSet()

    get_hooks = library("libtorch_cpu.so")._ZN2at6detail12getCUDAHooksEv
    get_hooks.restype = ctypes.POINTER(ctypes.c_void_p)
    hooks = get_hooks()
    methods = (ctypes.c_void_p * 80)(*(ctypes.c_void_p * 80).from_address(hooks[0]))
    # These two are isBuilt() and hasPrimaryContext().
    methods[2] = c_function(1)
    methods[4] = c_function(0)
    kept.append(methods)
    hooks[0] = ctypes.addressof(methods)


# The results of these have a size that depends on numbers when an index is a mask.
COUNTING = (aten.nonzero.default, aten.index.Tensor, aten.index_put_.default)
# CUDA's kernels for these want one type of all tensors.
OF_ONE_TYPE = (
    aten.native_group_norm.default,
    aten.native_group_norm_backward.default,
    aten.convolution.default,
    aten.convolution_backward.default,
)


def is_ours(file: str) -> bool:
    """Return whether a source file belongs to this project, and is not the present one."""
    if file == __file__ or "site-packages" in file:
        return False
    return file.startswith(str(ROOT))


def strides_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the strides of the dimensions in which a tensor has more than one number."""
    pairs = zip(tensor.stride(), tensor.shape, strict=True)
    return tuple(stride for stride, size in pairs if size > 1)


class Pretended(TorchDispatchMode):
    """Runs all operations that touch "cuda" on fake tensors.

    It refuses what CUDA's kernels would refuse. `waits` counts, by line and reason, how often the
    host waits for the device.
    """

    def __init__(self):
        super().__init__()
        from torch._subclasses.fake_tensor import FakeTensorMode

        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.waits = Counter()
        # Pinned tensors by address; they are kept here, so no other tensor gets their addresses.
        self.pinned = {}

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.pinned

    def wait(self, why: str) -> None:
        """Count a wait of the innermost line of this project that is now running."""
        where = "?"
        for frame, line in traceback.walk_stack(None):
            file = frame.f_code.co_filename
            if is_ours(file):
                where = f"{Path(file).relative_to(ROOT)}:{line}"
                break
        self.waits[f"{where}: {why}"] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        target = None
        if kwargs.get("device") is not None:
            target = torch.device(kwargs["device"]).type
        if target != "cuda" and not any(tensor.is_cuda for tensor in tensors):
            return func(*args, **kwargs)

        # This operation is the one of item(), tolist(), bool() and float().
        if func is aten._local_scalar_dense.default:
            self.wait("reads a number")
            if tensors[0].dtype is torch.bool:
                return False
            return 1.5 if tensors[0].is_floating_point() else 1

        if func in COUNTING and any(tensor.dtype is torch.bool for tensor in tensors[1:]):
            self.wait("counts what is true")

        if func in (aten._to_copy.default, aten.copy_.default):
            source = tensors[-1]
            if source.is_cuda and (target or tensors[0].device.type) == "cpu":
                self.wait("copies to the CPU")
                # The target keeps its numbers: DDP sends itself the order of its buckets by a copy.
                if func is aten.copy_.default:
                    return tensors[0]
                # Any numbers will do. They are ones, as a loss scale cannot be zero.
                dtype = kwargs.get("dtype") or source.dtype
                return torch.full(source.shape, source.is_floating_point(), dtype=dtype)

            asynchronous = kwargs.get("non_blocking") or args[2:3] == (True,)
            if not source.is_cuda and not (asynchronous and self.is_pinned(source)):
                self.wait("copies to the GPU, not from pinned memory or not non_blocking")

        self.check(func, args)
        with self.fake:
            return func(*args, **kwargs)

    def check(self, func, args: tuple) -> None:
        """Raise AssertionError for types and layouts that only CUDA's real kernels refuse."""
        if func in (aten._fused_adam_.default, aten._foreach_lerp_.Scalar):
            lists = [arg for arg in args[:4] if isinstance(arg, (list, tuple))]
            # A group has a parameter, its gradient and its moments, for example.
            for group in zip(*lists, strict=True):
                strides = {strides_of(tensor) for tensor in group}
                kinds = {(tensor.dtype, tensor.device, tensor.shape) for tensor in group}
                message = f"{func}: {kinds}, strides {strides}"
                assert len(strides) == 1, message
                assert len(kinds) == 1, message

        if func in OF_ONE_TYPE:
            dtypes = {arg.dtype for arg in args[:5] if isinstance(arg, torch.Tensor)}
            assert len(dtypes) == 1, f"{func}: types are mixed, {dtypes}"


def apply(module: torch.nn.Module, change, recurse: bool = True) -> torch.nn.Module:
    """Do what `Module._apply` does, which cannot exchange real parameters for fake ones."""
    for child in module.children():
        apply(child, change)
    for name, value in module._parameters.items():
        if value is not None:
            changed = change(value.detach())
            module._parameters[name] = torch.nn.Parameter(changed, value.requires_grad)
    for name, value in module._buffers.items():
        if value is not None:
            module._buffers[name] = change(value)
    return module


class Generator(torch.Generator):
    """A generator on the CPU, whatever the device."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


@contextlib.contextmanager
def pretended_cuda(memory: int = 80 * 10**9):
    """Within this context there is one CUDA device with so many bytes, all free."""
    from torch._prims_common import suggest_memory_format

    mode = Pretended()
    empty = torch.empty

    def pinning_empty(*size, pin_memory=False, **options):
        tensor = empty(*size, **options)
        if pin_memory:
            mode.pinned[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def pin(tensor):
        return pinning_empty(*tensor.shape, dtype=tensor.dtype, pin_memory=True)

    def layout(x, weight, backend):
        """Return what cuDNN's convolutions give: channels last if an input has them last."""
        formats = (suggest_memory_format(x), suggest_memory_format(weight))
        if torch.channels_last in formats:
            return torch.channels_last
        return torch.contiguous_format

    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "is_bf16_supported": True,
        "_lazy_init": None,
        "get_device_name": "pretended",
        "mem_get_info": (memory, memory),
        "memory_reserved": 0,
        "set_device": None,
        "current_stream": None,
        "empty_cache": None,
    }
    with contextlib.ExitStack() as stack:

        def patch(owner, name, value):
            stack.enter_context(mock.patch.object(owner, name, value))

        for name, answer in answers.items():
            patch(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
        # The replay of a graph does nothing.
        patch(torch.cuda, "CUDAGraph", mock.Mock)
        patch(torch.cuda, "graph", lambda graph, capture_error_mode: contextlib.nullcontext())
        patch(torch, "Generator", Generator)
        patch(torch, "empty", pinning_empty)
        patch(torch.Tensor, "pin_memory", pin)
        patch(torch.nn.Module, "_apply", apply)
        patch(torch._C, "_conv_determine_backend_memory_format", layout)
        patch(type(mode.fake), "avoid_device_init", True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        # So torch.tensor(..., device="cuda") makes a tensor on the CPU first, and copies it.
        torch._C._set_only_lift_cpu_tensors(True)
        yield stack.enter_context(mode)
