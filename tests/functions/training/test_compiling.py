"""Compiling before the first step; test_processes.py trains compiled networks.

The CPU stands in for the GPU, and stubs for the compiler that writes kernels.
"""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from functions.denoiser import Denoiser
from functions.noise_scheduler import NoiseScheduler
from functions.optimizers import Adam
from functions.support.errors import UserError
from functions.support.processes import SINGLE_PROCESS
from functions.training import compiling
from tests.spoilt_files import tiny_experiment, training_run


def fails(graph, inputs):
    raise ImportError("no C compiler")


def as_it_is(graph, inputs):
    return make_boxed_func(graph.forward)


# As with PyTorch's compiler, the graph of backward is compiled when backward is called first.
WORKS = aot_autograd(fw_compiler=as_it_is, bw_compiler=as_it_is)
FAILS = aot_autograd(fw_compiler=as_it_is, bw_compiler=fails)


class Toy(torch.nn.Module):
    """A network that is traced at once."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 1)

    def forward(self, x_t, t):
        return self.conv(x_t) + t[:, None, None, None]


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


def run_of(network):
    """Return what `compile_network` uses of the run that trains a network."""
    return SimpleNamespace(
        processes=SINGLE_PROCESS,
        experiment=tiny_experiment(),
        denoiser=Denoiser(network, NoiseScheduler(100)),
        optimizer=Adam(network.parameters(), 1e-3),
        scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10),
    )


def test_each_batch_size_is_compiled_before_the_first_step(monkeypatch):
    network = Toy()
    run = run_of(network)
    graphs = use_stub(monkeypatch)
    with mock.patch.object(compiling, "run_pass", wraps=compiling.run_pass) as passes:
        compiled = compiling.compile_network(network, run, {2, 1})
    assert compiled is not network
    assert len(graphs) == 2
    # The loss is scaled as in training.
    assert [call.args[1:] for call in passes.mock_calls] == [
        ((1, 3, 4, 4), 2.0**10),
        ((2, 3, 4, 4), 2.0**10),
    ]
    assert all(parameter.grad is None for parameter in network.parameters())

    # The steps compile nothing more.
    for batch_size in (2, 1, 2):
        compiling.run_pass(replace(run.denoiser, network=compiled), (batch_size, 3, 4, 4))
    assert len(graphs) == 2


def test_a_failure_is_one_sentence(monkeypatch):
    use_stub(monkeypatch, FAILS)
    with pytest.raises(UserError, match=r"no C compiler.*add --diffusion\.compile false"):
        compiling.compile_network(Toy(), run_of(Toy()), {2, 1})


def test_nothing_is_compiled_on_a_cpu_or_if_the_run_is_deterministic(monkeypatch):
    run = training_run()
    run.config = replace(run.config, compile=True)
    assert not run.is_to_compile
    use_stub(monkeypatch)
    assert run.is_to_compile
    run.config = replace(run.config, deterministic=True)
    assert not run.is_to_compile
