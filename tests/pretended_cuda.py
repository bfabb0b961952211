"""A CUDA device that is only pretended, on PyTorch's CPU build: for a process of its own, before any backward pass.

Its tensors have device, type, shape and layout, and no numbers (they are fake tensors); what is on the CPU stays real.
Tensors on different devices raise, as do types and layouts that CUDA's kernels refuse. Every line at which the host
waits for the device is counted. All this stands on private parts of PyTorch.
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
kept = []  # what C++ points to


def c_function(result: int) -> int:
    kept.append(ctypes.CFUNCTYPE(ctypes.c_int)(lambda: result))
    return ctypes.cast(kept[-1], ctypes.c_void_p).value


def let_autograd_know_cuda() -> None:
    """Autograd asks a device's guard and hooks, which a CPU build lacks: give it a guard that does nothing."""
    load = lambda name: ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
    guards = (ctypes.c_void_p * 22).in_dll(
        load("libc10.so"), "_ZN3c104impl26device_guard_impl_registryE"
    )
    # Of an object all of whose methods return 0
    table = (ctypes.c_void_p * 64)(*[c_function(0)] * 64)
    guard = ctypes.c_void_p(ctypes.addressof(table))
    kept.extend([table, guard])
    guards[1] = ctypes.addressof(guard)  # 1 is CUDA
    torch._C._ensureCUDADeviceGuardSet()  # puts PyTorch's own, which does nothing, in its place
    get_hooks = load("libtorch_cpu.so")._ZN2at6detail12getCUDAHooksEv
    get_hooks.restype = ctypes.POINTER(ctypes.c_void_p)
    hooks = get_hooks()
    methods = (ctypes.c_void_p * 80)(*(ctypes.c_void_p * 80).from_address(hooks[0]))
    methods[2], methods[4] = c_function(1), c_function(0)  # isBuilt(), hasPrimaryContext()
    kept.append(methods)
    hooks[0] = ctypes.addressof(methods)


class Pretended(TorchDispatchMode):
    """Runs everything that touches "cuda" on fake tensors, refuses what CUDA's kernels would, and counts waits."""

    def __init__(self):
        super().__init__()
        from torch._subclasses.fake_tensor import FakeTensorMode

        self.fake, self.waits = FakeTensorMode(allow_non_fake_inputs=True), Counter()
        self.pinned = {}  # by address; kept, so that no other tensor gets it

    def wait(self, why: str) -> None:
        own = lambda name: (
            name.startswith(str(ROOT)) and "site-packages" not in name and name != __file__
        )
        lines = [frame for frame in traceback.extract_stack() if own(frame.filename)]
        where = f"{Path(lines[-1].filename).relative_to(ROOT)}:{lines[-1].lineno}" if lines else "?"
        self.waits[f"{where}: {why}"] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, tensors = (
            kwargs or {},
            [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)],
        )
        target = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
        if target != "cuda" and not any(t.is_cuda for t in tensors):
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:  # item, tolist, bool, float
            self.wait("reads a number")
            return (
                False
                if tensors[0].dtype is torch.bool
                else 1.5
                if tensors[0].is_floating_point()
                else 1
            )
        counting = (aten.nonzero.default, aten.index.Tensor, aten.index_put_.default)
        if func in counting and any(t.dtype is torch.bool for t in tensors[1:]):
            self.wait("counts what is true")
        if func in (aten._to_copy.default, aten.copy_.default):
            source, waits = tensors[-1], not (kwargs.get("non_blocking") or args[2:3] == (True,))
            if source.is_cuda and (target or tensors[0].device.type) == "cpu":
                self.wait("copies to the CPU")
                if func is aten.copy_.default:
                    return tensors[0]  # keeps its numbers: DDP sends the order of its buckets so
                # Any numbers do: ones, as zero is no loss scale
                return torch.full(
                    source.shape,
                    source.is_floating_point(),
                    dtype=kwargs.get("dtype") or source.dtype,
                )
            if not source.is_cuda and (
                waits or source.untyped_storage().data_ptr() not in self.pinned
            ):
                self.wait("copies to the GPU, not from pinned memory or not non_blocking")
        self.check(func, args)
        with self.fake:
            return func(*args, **kwargs)

    def check(self, func, args: tuple) -> None:
        """AssertionError for types and layouts that CUDA's kernels refuse and fake tensors do not."""
        if func in (aten._fused_adam_.default, aten._foreach_lerp_.Scalar):
            for group in zip(
                *(arg for arg in args[:4] if isinstance(arg, (list, tuple))), strict=True
            ):
                strides = {
                    tuple(s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1)
                    for t in group
                }
                kinds = {(t.dtype, t.device, t.shape) for t in group}
                assert len(strides) == 1 and len(kinds) == 1, f"{func}: {kinds}, strides {strides}"
        if func in (
            aten.native_group_norm.default,
            aten.native_group_norm_backward.default,
            aten.convolution.default,
            aten.convolution_backward.default,
        ):
            dtypes = {a.dtype for a in args[:5] if isinstance(a, torch.Tensor)}
            assert len(dtypes) == 1, f"{func}: types are mixed, {dtypes}"


def apply(module: torch.nn.Module, change, recurse: bool = True) -> torch.nn.Module:
    """`Module._apply`, which cannot exchange fake parameters for real ones."""
    for child in module.children():
        apply(child, change)
    for name, value in module._parameters.items():
        if value is not None:
            module._parameters[name] = torch.nn.Parameter(
                change(value.detach()), value.requires_grad
            )
    module._buffers.update(
        {name: change(value) for name, value in module._buffers.items() if value is not None}
    )
    return module


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):  # on the CPU, whatever the device
        return super().__new__(cls, "cpu")


@contextlib.contextmanager
def pretended_cuda(memory: int = 80 * 10**9):
    """Within, there is one CUDA device with so many bytes, all free."""
    from torch._prims_common import suggest_memory_format

    mode, empty = Pretended(), torch.empty

    def pinning_empty(*size, pin_memory=False, **how):
        tensor = empty(*size, **how)
        mode.pinned |= {tensor.untyped_storage().data_ptr(): tensor} if pin_memory else {}
        return tensor

    def layout(x, weight, backend):
        last = torch.channels_last in (suggest_memory_format(x), suggest_memory_format(weight))
        return torch.channels_last if last else torch.contiguous_format

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
        "empty_cache": None,
    }
    with contextlib.ExitStack() as stack:
        patch = lambda owner, name, value: stack.enter_context(
            mock.patch.object(owner, name, value)
        )
        for name, answer in answers.items():
            patch(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
        patch(torch.cuda, "CUDAGraph", mock.Mock)  # a replay does nothing
        patch(torch.cuda, "graph", lambda graph, capture_error_mode: contextlib.nullcontext())
        patch(torch, "Generator", Generator)
        patch(torch, "empty", pinning_empty)
        patch(
            torch.Tensor,
            "pin_memory",
            lambda t: pinning_empty(*t.shape, dtype=t.dtype, pin_memory=True),
        )
        patch(torch.nn.Module, "_apply", apply)
        patch(torch._C, "_conv_determine_backend_memory_format", layout)
        patch(type(mode.fake), "avoid_device_init", True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        # Torch.tensor(..., device="cuda") is made on the CPU, then copied
        torch._C._set_only_lift_cpu_tensors(True)
        yield stack.enter_context(mode)
