"""Record a network as a CUDA graph, and replay the graph for each call."""

import sys

import torch
from torch import Tensor, nn
from tqdm import tqdm

from functions.support.device import is_out_of_memory
from functions.support.files import short


class CudaGraphed:
    """A network on CUDA that is called by replaying a CUDA graph of it.

    The CPU then launches one graph instead of a thousand kernels. When the batch size changes, the
    graph is recorded again, because padding a smaller batch would change its bits. If recording
    fails, the network itself is called from then on.
    """

    # After the first failure this is False, and no network is recorded in this process.
    can_record = True

    def __init__(self, network: nn.Module):
        self.network = network
        # The graph, and the tensors that it reads (x_t and t) and writes.
        self.recording = None

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the network's output, without gradients. Later calls do not change it."""
        if self.can_record and (not self.recording or len(self.recording[1]) != len(x_t)):
            # This frees the memory of the previous graph before the next is recorded.
            self.recording = None
            self.record(x_t, t)
        if not self.recording:
            return self.network(x_t, t)
        graph, graph_x_t, graph_t, output = self.recording
        graph_x_t.copy_(x_t)
        graph_t.copy_(t)
        graph.replay()
        # The next replay overwrites `output`.
        return output.clone()

    def record(self, x_t: Tensor, t: Tensor) -> None:
        """Record the network for batches of this size; if that fails, set `can_record` to False."""
        # In this call cuDNN selects its kernels. It cannot do so while a graph is recorded.
        self.network(x_t, t)
        inputs = (x_t.clone(), t.clone())
        graph = torch.cuda.CUDAGraph()
        # A failed recording leaves another stream current, so this one must be restored.
        stream = torch.cuda.current_stream()
        try:
            # In this mode other threads may use the GPU during the recording.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                output = self.network(*inputs)
            self.recording = (graph, *inputs, output)
        except RuntimeError as error:
            torch.cuda.set_stream(stream)
            # When a recording fails, leaving the context raises a second error. The original error
            # is its `__context__`.
            reason = error
            if isinstance(error.__context__, (RuntimeError, KeyboardInterrupt)):
                reason = error.__context__
            if isinstance(reason, KeyboardInterrupt) or is_out_of_memory(reason):
                raise reason from None
            CudaGraphed.can_record = False
            tqdm.write(
                "the network cannot be recorded as a CUDA graph, so it runs without one, which is "
                f"slower: {short(reason)}",
                file=sys.stderr,
            )
