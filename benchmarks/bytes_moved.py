"""The bytes that one forward and backward pass moves on CUDA, and the kernels it launches.

They are counted, so without a GPU: `python benchmarks/bytes_moved.py`, with PyTorch's CPU build, on
the pretended device of tests/pretended_cuda.py, takes some minutes. Eagerly each operation reads
its inputs and writes its outputs once. Compiled it is PyTorch's own count of what its scheduler
made of the graph for an H100, just before it would write code. It stands on private parts of
PyTorch.
"""

import contextlib
import itertools
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor
from torch._functorch import config as tracing
from torch._inductor import config as lowering
from torch._inductor.compile_fx import compile_fx
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import EXPERIMENTS
from functions.training.compiling import OPTIONS
from models.unet import UNet
from tests.pretended_cuda import let_autograd_know_cuda, pretended_cuda

IMAGES = 20  # in the pass
BANDWIDTH = 2.8e12  # bytes a second that an H100 may reach; its data sheet says 3.35
H100 = SimpleNamespace(
    major=9,
    minor=0,
    name="H100",
    multi_processor_count=132,
    total_memory=80 * 10**9,
    warp_size=32,
    gcnArchName="",
    regs_per_multiprocessor=2**16,
    max_threads_per_multi_processor=2048,
    shared_memory_per_block=48 * 2**10,
    shared_memory_per_block_optin=227 * 2**10,
    max_threads_per_block=1024,
    L2_cache_size=50 * 2**20,
)
ANSWERS = {  # of torch.cuda's functions
    "is_available": True,
    "current_device": 0,
    "device_count": 1,
    "_lazy_init": None,
    "synchronize": None,
    "get_device_capability": (9, 0),
    "get_device_properties": H100,
    "_get_device_properties": H100,
    "get_rng_state": torch.zeros(16, dtype=torch.uint8),
    "set_rng_state": None,
    "_exchange_device": 0,
    "_maybe_exchange_device": 0,
}


def main() -> None:
    warnings.simplefilter("ignore")
    let_autograd_know_cuda()
    print(f"| {IMAGES} images | base | GB | launches | ms at {BANDWIDTH / 1e12} TB/s |")
    print("|---|---|---|---|---|")
    arms = {
        "eager, norms recomputed": eagerly,
        "eager, nothing recomputed": eagerly,
        "compiled": compiled,
    }
    for base_dim, (name, count) in itertools.product((64, 128), arms.items()):
        moved, launches = count(
            *network_and_inputs(base_dim, "norms" if "norms" in name else "none")
        )
        milliseconds = 1000 * moved / BANDWIDTH
        print(
            f"| {name} | {base_dim} | {moved / 1e9:.1f} | {launches:,} | {milliseconds:.0f} |",
            flush=True,
        )


def network_and_inputs(base_dim: int, recompute: str) -> tuple[UNet, Tensor, Tensor]:
    """ffhq-run2's, with another width."""
    model = EXPERIMENTS["ffhq-run2"].override({}, {"base_dim": base_dim}).model
    with torch.device("meta"):
        network = UNet(**vars(model))
    network.set_recompute(recompute)
    x_t = torch.empty(IMAGES, 3, model.image_size, model.image_size).to(
        memory_format=torch.channels_last
    )
    return network, x_t, torch.zeros(IMAGES, dtype=torch.int64)


class Counted(BaseException):
    """All is counted, and nothing is to be run. (A compiler would wrap an Exception.)"""


class Counting(TorchDispatchMode):
    """Counts all operations that are no views."""

    moved = launches = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        read, written = (
            [t for t in tree_leaves(tree) if isinstance(t, Tensor)]
            for tree in ((args, kwargs), outputs)
        )
        own = {t.untyped_storage()._cdata for t in read}
        if func._schema.is_mutable or any(t.untyped_storage()._cdata not in own for t in written):
            self.moved += sum(t.numel() * t.element_size() for t in (*read, *written))
            self.launches += 1
        return outputs


def eagerly(network: UNet, x_t: Tensor, t: Tensor) -> tuple[int, int]:
    """Bytes and launches, one of each operation."""
    with pretended_cuda():
        network = network.to_empty(device="cuda").to(memory_format=torch.channels_last)
        x_t, t = x_t.to("cuda"), t.to("cuda")
        with Counting() as counting:
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                loss = network(x_t, t).float().sum()
            loss.backward()
    return counting.moved, counting.launches


def compiled(network: UNet, x_t: Tensor, t: Tensor) -> tuple[int, int]:
    """Bytes and kernels, as the scheduler counts them."""
    network = network.to_empty(device="cpu").to(memory_format=torch.channels_last)
    counts = []

    def count(graph: GraphLowering) -> SimpleNamespace:  # in place of writing code
        graph.init_wrapper_code()
        graph._update_scheduler()
        nodes = graph.scheduler.nodes
        counts.append((sum(node.get_read_write_buffers_sizes() for node in nodes), len(nodes)))
        return SimpleNamespace(call=tuple, __file__="", key="")

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> None:
        """The graph of the CPU, for CUDA."""
        for node in graph.graph.nodes:
            named = [name for name, value in node.kwargs.items() if isinstance(value, torch.device)]
            node.kwargs = {**node.kwargs, **dict.fromkeys(named, torch.device("cuda:0"))}
        graph.recompile()
        settings = {"force_disable_caches": True, "joint_graph_constant_folding": False, **OPTIONS}
        with contextlib.ExitStack() as stack:
            for name, answer in ANSWERS.items():
                stack.enter_context(
                    mock.patch.object(
                        torch.cuda, name, lambda *_, answer=answer: answer, create=True
                    )
                )
            stack.enter_context(mock.patch("torch._inductor.scheduler.has_triton", lambda *_: True))
            stack.enter_context(mock.patch.object(GraphLowering, "compile_to_module", count))
            stack.enter_context(mock.patch.object(FakeTensorMode, "avoid_device_init", True))
            stack.enter_context(tracing.patch(force_non_lazy_backward_lowering=True))
            stack.enter_context(lowering.patch(**settings))
            with FakeTensorMode(allow_non_fake_inputs=True) as fake:
                inputs = [
                    torch.empty_strided(
                        i.shape,
                        i.stride(),
                        dtype=i.dtype,
                        device="cuda:0",
                        requires_grad=i.requires_grad,
                    )
                    for i in inputs
                ]
            stack.enter_context(torch.autocast("cuda", torch.bfloat16))
            stack.enter_context(torch._guards.tracing(torch._guards.TracingContext(fake)))
            compile_fx(graph, inputs)
        raise Counted

    with contextlib.suppress(Counted):
        torch.compile(network, dynamic=False, backend=backend)(x_t, t)
    (forward, launches), (backward, more) = counts
    return forward + backward, launches + more


if __name__ == "__main__":
    main()
