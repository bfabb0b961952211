"""The compiled network trains as the plain one, where it pays; what fails or differs is not used.

No code is generated here: graphs are captured and run as they are.
"""

import re
import shlex
from functools import partial, partialmethod

import pytest
import torch
from functorch.compile import min_cut_rematerialization_partition as min_cut
from functorch.compile import nop
from torch._dynamo.backends.common import aot_autograd
from torch.nn.parallel import DistributedDataParallel

import train
from config import EXPERIMENTS
from functions.noise_scheduler import NoiseScheduler
from functions.prediction import Denoiser
from functions.support.processes import SINGLE_PROCESS
from functions.training import compiling
from functions.training.memory import run_pass
from models.unet import UNet
from tests.conftest import ONE_LEVEL, SMALL_MODEL, call, train_tiny
from tests.functions.support.test_processes import FLAGS, assert_alike, two
from tests.kill import assert_same_run

pytestmark = pytest.mark.slow
# All graphs that were captured; with DDP there is one for each of its buckets.
compiled = []
# How many convolutions each backward pass computes again.
repeated = []


def counting(graph, inputs):
    """Be a backend of torch.compile that counts graphs, and convolutions in backward passes."""
    compiled.append(graph)
    backend = aot_autograd(fw_compiler=nop, bw_compiler=count_convolutions, partition_fn=min_cut)
    return backend(graph, inputs)


def count_convolutions(graph, inputs):
    convolution = torch.ops.aten.convolution.default
    repeated.append(sum(node.target is convolution for node in graph.graph.nodes))
    return nop(graph, inputs)


def fast_compile(network, dynamic, options, compile=torch.compile):
    # The real backend refuses options that it does not know; it does nothing before its first call.
    compile(network, options=options)
    return compile(network, dynamic=dynamic, backend=counting)


class Wrong(torch.nn.Module):
    """What a compiler may make of a network: something that raises, or another function.

    The other function is `factor` times the network.
    """

    def __init__(self, network, factor=None, **how):
        super().__init__()
        self.network = network
        self.factor = factor

    def forward(self, x_t, t):
        if self.factor is None:
            raise RuntimeError("no compiler\nfound")
        return self.factor * self.network(x_t, t)


class InFloat32(torch.nn.Module):
    """A network without the rounding of autocast."""

    def __init__(self, network, **how):
        super().__init__()
        self.network = network

    def forward(self, x_t, t):
        with torch.autocast("cpu", enabled=False):
            return self.network(x_t, t)


def prepare(patch, compile=fast_compile, seconds=0.5):
    """Make compiling pay on the CPU, too, as it takes no time.

    Passes pretend to take 1 s, and `seconds` when they are compiled.
    """

    def timed(denoiser, *arguments):
        run_pass(denoiser, *arguments)
        plain = isinstance(denoiser.network, (UNet, DistributedDataParallel))
        return 1 if plain else seconds

    patch.setattr(compiling, "DEVICES", ("cpu",))
    patch.setattr(compiling, "COMPILE_SECONDS", 0)
    patch.setattr(compiling, "run_pass", timed)
    patch.setattr(torch, "compile", compile)


@pytest.fixture
def trained(pictures, tmp_path, capsys):
    """Return a function that trains with some flags: it returns the run and what was printed."""

    def run(*flags):
        # Each run has a folder of its own, so that it can be found there.
        runs = tmp_path / f"{len([*tmp_path.iterdir()])}"
        return train_tiny(pictures, runs, *flags), capsys.readouterr().out

    return run


def test_a_compiled_training_is_the_plain_one(tiny_run, trained, monkeypatch):
    prepare(monkeypatch)
    run, printed = trained()

    # There is one graph, and its backward pass computes no convolution of the forward pass again.
    assert len(compiled) == 1
    assert repeated == [0]
    assert "compiling  estimate: takes about 0 s, saves about" in printed
    assert "a pass takes" in printed
    assert_alike(tiny_run, run)


@pytest.mark.parametrize(
    ("factor", "why"),
    [
        (None, r"RuntimeError: no compiler\\nfound"),
        (-1, r"its gradients differ by \d+%"),
        (1, "it is slower: 2 s per pass, not 1"),
    ],
)
def test_what_fails_differs_or_is_slower_is_left_out_and_leaves_nothing_behind(
    factor, why, tiny_run, trained, monkeypatch
):
    """The run is then bit for bit the one that never tried to compile."""
    prepare(monkeypatch, partial(Wrong, factor=factor), seconds=2)
    run, printed = trained()
    assert re.search(f"failed, so training continues without it: {why}\n", printed)
    assert_same_run(tiny_run, run)


@pytest.fixture
def choose():
    """Return a function of a precision that lets a small network be compiled, or left plain."""
    # One level has all kinds of layers but those between levels.
    one_level = {"image_size": 8, "dim_multiply": (1,), "transformer_layers": ()}
    experiment = EXPERIMENTS["faces"].override({}, SMALL_MODEL | one_level)
    network = UNet(**vars(experiment.model))

    def chosen(precision=torch.float32):
        denoiser = Denoiser(network, NoiseScheduler(100), precision)
        torch.manual_seed(0)
        config = experiment.diffusion
        return compiling.compile_if_worth_it(
            denoiser, network, config, [slice(0, 1)], 1, SINGLE_PROCESS
        )

    chosen.network = network
    return chosen


def test_each_gradient_is_compared(choose, monkeypatch, capsys):
    """The output is right, and the gradient of one parameter is zero."""
    for name, parameter in choose.network.named_parameters():
        hooks = []

        def zeroing(network, parameter=parameter, hooks=hooks, **how):
            hooks.append(parameter.register_hook(torch.zeros_like))
            return Wrong(network, factor=1)

        prepare(monkeypatch, zeroing)
        chosen = choose()
        hooks[0].remove()

        # Zero is right for the bias of keys, which adds the same to all that a softmax compares.
        refused = chosen.network is choose.network
        assert refused == (not name.endswith("key.bias")), name
        assert ("its gradients differ by" in capsys.readouterr().out) == refused


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_rounding_is_no_difference(precision, choose, monkeypatch):
    # The gradients of conv_out are too large for float16 then.
    choose.network.norm_out.weight.data.fill_(1000)
    prepare(monkeypatch, InFloat32)
    assert isinstance(choose(precision).network, InFloat32)


@pytest.mark.parametrize("setting", [("compile", "off"), ("deterministic", "true"), None])
def test_it_is_not_tried_in_vain(setting, trained, monkeypatch):
    """It is left out with some settings, and in a run that is too short for it."""
    flags = []
    if setting:
        field, value = setting
        prepare(monkeypatch, Wrong)
        flags = [f"--diffusion.{field}", value]
        expected = f"as {field} = "
    else:
        # Compiling takes its real time here, and five steps are not worth it.
        monkeypatch.setattr(compiling, "DEVICES", ("cpu",))
        expected = "estimate: takes about 240 s, saves about 0 s over 5 steps"

    _, printed = trained("--diffusion.epochs", 1, *flags)
    assert "  compiling  is off" in printed
    assert expected in printed
    assert "failed" not in printed


def train_compiled():
    """Train in a process of its own, with a compiler that is fast and with small buckets of DDP.

    Small buckets are needed for there to be more than one.
    """
    prepare(pytest.MonkeyPatch())
    torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = 2**14
    DistributedDataParallel.__init__ = partialmethod(
        DistributedDataParallel.__init__, bucket_cap_mb=0.02
    )
    train.main()
    print(len(compiled), "graphs")


def test_two_processes_with_compiled_networks_give_the_losses_of_one(pictures, tmp_path):
    # One level is captured sooner.
    flags = [*FLAGS, *ONE_LEVEL, "--diffusion.dataset-name", pictures]
    flags += shlex.split("--diffusion.batch-size 4 --diffusion.gradient-accumulation 2 --runs")
    call(train.main, *flags, tmp_path / "one")
    programs = two(tmp_path, *flags, tmp_path / "two", act=train_compiled)
    assert [program.wait() for program in programs] == [0, 0], programs[0].printed
    assert "a pass takes" in programs[0].printed
    assert "3 graphs" in programs[0].printed

    (one,) = (tmp_path / "one").iterdir()
    (other,) = (tmp_path / "two").iterdir()
    assert_alike(one, other)
