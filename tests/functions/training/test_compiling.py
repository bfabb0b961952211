"""Compiling before the first step: its success, and each way in which it can fail.

The CPU stands in for the GPU, and stubs for the compiler that writes kernels.
"""

import json
import shlex
import weakref
from functools import partial

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from config import EXPERIMENTS
from functions.noise_scheduler import NoiseScheduler
from functions.prediction import Denoiser
from functions.support.processes import SINGLE_PROCESS, Processes
from functions.training import compiling
from tests.conftest import CPU, newest, train_tiny

CONFIG = EXPERIMENTS["faces"].diffusion
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


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

    channels = 3
    image_size = 4

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
    patch.setattr(compiling, "DEVICES", ("cpu",))
    patch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    return graphs


def compile_small(network, processes=SINGLE_PROCESS, scaler=NO_SCALER, config=CONFIG):
    denoiser = Denoiser(network, NoiseScheduler(100))
    return compiling.compile_network(network, denoiser, config, scaler, {2, 1}, processes)


def test_each_batch_size_is_compiled_before_the_first_step(monkeypatch):
    network = Toy()
    graphs = use_stub(monkeypatch, "works")
    compiled = compile_small(network)
    assert compiled is not network
    assert len(graphs) == 2
    assert all(parameter.grad is None for parameter in network.parameters())

    # Nothing is compiled again in the steps.
    denoiser = Denoiser(compiled, NoiseScheduler(100))
    for batch_size in (2, 1, 2):
        compiling.run_pass(denoiser, (batch_size, 3, 4, 4))
    assert len(graphs) == 2


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_failure_is_one_line_and_frees_the_memory_of_its_pass(where, monkeypatch, capsys):
    network = Toy()
    inputs = []
    run_pass = compiling.run_pass

    def watched(trial, shape, scale):
        images = torch.zeros(shape)
        inputs.append(weakref.ref(images))
        run_pass(trial, shape, scale)

    alive = []

    class Looking(Processes):
        def gather(self, value):
            alive.extend(images() for images in inputs)
            return [value]

    use_stub(monkeypatch, where)
    monkeypatch.setattr(compiling, "run_pass", watched)
    assert compile_small(network, Looking()) is network
    printed = capsys.readouterr().out
    assert "compiling failed, so training goes on without: " in printed
    assert "no C compiler" in printed
    assert printed.count("\n") == 2
    assert all(parameter.grad is None for parameter in network.parameters())
    # The error's traceback would keep what the failed pass has computed, until training begins.
    assert alive == [None]


def test_one_failure_among_several_processes_is_the_failure_of_all(monkeypatch, capsys):
    """This process is the first of two, and its own compiler works."""
    contexts = []

    class TwoProcesses(Processes):
        def gather(self, value):
            assert value == ""
            return [value, "Broken: no C compiler"]

        def gradient_sync(self, wrapped, last):
            contexts.append(last)
            return super().gradient_sync(torch.nn.parallel.DataParallel(wrapped), last=True)

    network = Toy()
    # DDP's gradients exist from the start.
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    use_stub(monkeypatch, "works")
    assert compile_small(network, TwoProcesses(0, 2)) is network
    assert "goes on without: Broken: no C compiler\n" in capsys.readouterr().out
    # No gradients are exchanged, and they are zero again.
    assert contexts == [False]
    assert not any(parameter.grad.any() for parameter in network.parameters())


def test_the_loss_is_scaled_as_in_training(monkeypatch):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scales = []
    monkeypatch.setattr(compiling, "DEVICES", ("cpu",))
    monkeypatch.setattr(compiling, "run_pass", lambda trial, shape, scale: scales.append(scale))
    compile_small(Toy(), scaler=scaler)
    assert scales == [2.0**10] * 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({}, "the device is cpu"), ({"deterministic": True}, "deterministic = True")],
)
def test_where_nothing_is_compiled_it_is_said(changes, reason, capsys):
    network = Toy()
    config = EXPERIMENTS["ffhq-v"].override(changes, {}).diffusion
    assert config.compile
    assert compile_small(network, config=config) is network
    assert capsys.readouterr().out == f"the network is not compiled, as {reason}\n"
    assert next(network.parameters()).device == CPU


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
    for part in ("model", "ema", "exp_avg"):
        expected = newest(plain)[part]
        torch.testing.assert_close(newest(compiled)[part], expected, rtol=1e-3, atol=1e-4)
