"""Compiling before the first step; test_processes.py trains compiled networks.

The CPU stands in for the GPU, and stubs for the compiler that writes kernels.
"""

from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from functions.support.errors import UserError
from functions.training import compiling
from functions.training.memory import explain_lack_of_memory
from tests.small_training import training_run


def fails(graph, inputs):
    raise ImportError("no C compiler")


def needs_more_memory(*tensors):
    raise torch.OutOfMemoryError("CUDA out of memory")


def as_it_is(graph, inputs):
    return make_boxed_func(graph.forward)


# As with PyTorch's compiler, the graph of backward is compiled when backward is called first.
WORKS = aot_autograd(fw_compiler=as_it_is, bw_compiler=as_it_is)
FAILS = aot_autograd(fw_compiler=as_it_is, bw_compiler=fails)


def use_stub(patch, stub=WORKS):
    """Let torch.compile use a stub on the CPU; return a list that gets each graph it is given."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return stub(graph, inputs)

    torch.compiler.reset()
    patch.setattr("functions.training.run.COMPILED_DEVICES", ("cpu",))
    patch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    return graphs


@pytest.mark.slow
def test_each_batch_size_is_compiled_before_the_first_step(monkeypatch):
    run = training_run()
    graphs = use_stub(monkeypatch)
    with mock.patch.object(compiling, "run_pass", wraps=compiling.run_pass) as passes:
        compiled = compiling.compile_network(run.model, run, {2, 1})
    assert compiled is not run.model
    assert len(graphs) == 2
    # The loss is scaled as in training.
    scale = run.scaler.get_scale()
    expected = [((size, 3, 4, 4), scale) for size in (1, 2)]
    assert [call.args[1:] for call in passes.mock_calls] == expected
    assert all(parameter.grad is None for parameter in run.model.parameters())

    # The steps compile nothing more.
    for batch_size in (2, 1, 2):
        compiling.run_pass(replace(run.denoiser, network=compiled), (batch_size, 3, 4, 4))
    assert len(graphs) == 2


@pytest.mark.slow
def test_a_failure_is_one_sentence(monkeypatch):
    run = training_run()
    use_stub(monkeypatch, FAILS)
    with pytest.raises(UserError, match=r"no C compiler.*add --diffusion\.compile false"):
        compiling.compile_network(run.model, run, {2, 1})


@pytest.mark.slow
def test_a_lack_of_memory_is_no_failure_of_the_compiler(monkeypatch):
    run = training_run()
    use_stub(monkeypatch, lambda graph, inputs: needs_more_memory)
    advice = r"out of memory with 16 images.*--diffusion\.batch-size 8"
    with pytest.raises(UserError, match=advice), explain_lack_of_memory(run):
        compiling.compile_network(run.model, run, {2, 1})


def test_nothing_is_compiled_on_a_cpu_or_if_the_run_is_deterministic(monkeypatch):
    run = training_run()
    run.config = replace(run.config, compile=True)
    assert not run.is_to_compile
    use_stub(monkeypatch)
    assert run.is_to_compile
    run.config = replace(run.config, deterministic=True)
    assert not run.is_to_compile
