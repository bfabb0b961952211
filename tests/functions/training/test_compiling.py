"""Compiling before the first step: its success, and each way in which it can fail.

The CPU stands in for the GPU, and stubs for the compiler that writes kernels.
"""

import json
import shlex
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
from tests.conftest import newest, train_tiny
from tests.spoilt_files import tiny_experiment, training_run


class Broken(Exception):
    """The error of a compiler that fails."""


def fails(graph, inputs):
    raise Broken("no C compiler")


def as_it_is(graph, inputs):
    return make_boxed_func(graph.forward)


# As with PyTorch's compiler, the graph of backward is compiled when backward is called first.
STUBS = {
    "works": aot_autograd(fw_compiler=as_it_is, bw_compiler=as_it_is),
    "forward": aot_autograd(fw_compiler=fails, bw_compiler=as_it_is),
    "backward": aot_autograd(fw_compiler=as_it_is, bw_compiler=fails),
}


class Toy(torch.nn.Module):
    """A network that is traced at once."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 1)

    def forward(self, x_t, t):
        return self.conv(x_t) + t[:, None, None, None]


def use_stub(patch, name):
    """Let torch.compile use a stub on the CPU; return a list that gets each graph it is given."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return STUBS[name](graph, inputs)

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
    graphs = use_stub(monkeypatch, "works")
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


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_failure_is_one_sentence(where, monkeypatch):
    use_stub(monkeypatch, where)
    with pytest.raises(UserError, match=r"no C compiler.*add --diffusion\.compile false"):
        compiling.compile_network(Toy(), run_of(Toy()), {2, 1})


def test_nothing_is_compiled_on_a_cpu_or_if_the_run_is_deterministic(monkeypatch):
    run = training_run()
    run.config = replace(run.config, compile=True)
    assert not run.is_to_compile
    use_stub(monkeypatch, "works")
    assert run.is_to_compile
    run.config = replace(run.config, deterministic=True)
    assert not run.is_to_compile


@pytest.mark.slow
def test_a_compiled_run_says_so_and_has_the_numbers_of_a_plain_one(
    pictures, tmp_path, monkeypatch, capsys
):
    flags = shlex.split("--diffusion.epochs 1 --diffusion.batch-size 3")
    flags += shlex.split("--diffusion.gradient-accumulation 3")
    plain = train_tiny(pictures, tmp_path / "plain", *flags)
    flags += ["--diffusion.compile", "true"]
    graphs = use_stub(monkeypatch, "works")
    compiled = train_tiny(pictures, tmp_path / "compiled", *flags)

    assert len(graphs) == 1
    assert "compiling the network" in capsys.readouterr().out
    configs = [json.loads((run / "config.json").read_text()) for run in (plain, compiled)]
    assert [config["run"]["arithmetic"]["compiled"] for config in configs] == [False, True]
    for part in ("model", "ema", "optimizer"):
        expected = newest(plain)[part]
        torch.testing.assert_close(newest(compiled)[part], expected, rtol=1e-3, atol=1e-4)
