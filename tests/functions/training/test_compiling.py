"""The compiled network trains as the plain one, where it pays; what fails or differs is not used. No code is made."""

import re
from functools import partial, partialmethod

import pytest
import torch
from functorch.compile import min_cut_rematerialization_partition as min_cut
from functorch.compile import nop
from torch._dynamo.backends.common import aot_autograd
from torch.nn.parallel import DistributedDataParallel

import train
from functions.training import compiling
from tests.conftest import call, train_tiny
from tests.functions.support.test_processes import FLAGS, assert_alike, two
from tests.kill import assert_same_run

pytestmark = pytest.mark.slow
# The graphs, with DDP one for each of its buckets; convolutions in backward passes
compiled, repeated = [], []


def counting(graph, inputs):
    compiled.append(graph)
    return aot_autograd(fw_compiler=nop, bw_compiler=count_convolutions, partition_fn=min_cut)(
        graph, inputs
    )


def count_convolutions(graph, inputs):
    repeated.append(
        sum(node.target is torch.ops.aten.convolution.default for node in graph.graph.nodes)
    )
    return nop(graph, inputs)


def fast_compile(network, dynamic, options, compile=torch.compile):
    compile(network, options=options)  # which knows all of them, and does nothing yet
    return compile(network, dynamic=dynamic, backend=counting)


class Wrong(torch.nn.Module):
    """What a compiler may make of a network: something that raises, or another function."""

    def __init__(self, network, factor=None, **how):
        super().__init__()
        self.network, self.factor = network, factor

    def forward(self, x_t, t):
        if self.factor is None:
            raise RuntimeError("no compiler\nfound")
        return self.factor * self.network(x_t, t)


def prepare(patch, compile=fast_compile):
    """Compiling pays on the CPU too."""
    patch.setattr(compiling, "DEVICES", ("cpu",))
    patch.setattr(compiling, "COMPILING", 0)
    patch.setattr(torch, "compile", compile)


@pytest.fixture
def trained(pictures, tmp_path, capsys):
    def run(*flags):
        runs = tmp_path / f"{len([*tmp_path.iterdir()])}"
        return train_tiny(pictures, runs, *flags), capsys.readouterr().out

    return run


def test_a_compiled_training_is_the_plain_one(trained, monkeypatch):
    plain, _ = trained()
    prepare(monkeypatch)
    run, printed = trained()
    assert len(compiled) == len(repeated) == 1 and repeated == [0]
    assert "compiling  takes some 0 s and save some" in printed and "a pass takes" in printed
    assert_alike(plain, run)


@pytest.mark.parametrize(
    ("factor", "why"),
    [(None, r"RuntimeError: no compiler\\nfound"), (-1, r"its gradients differ by \d+%")],
)
def test_what_fails_or_differs_is_left_out_and_leaves_nothing_behind(
    factor, why, trained, monkeypatch
):
    plain, _ = trained()
    prepare(monkeypatch, partial(Wrong, factor=factor))
    run, printed = trained()
    assert re.search(f"failed, so it goes on without: {why}\n", printed)
    assert_same_run(plain, run)


@pytest.mark.parametrize(
    "flags", [["compile", "off"], ["deterministic", "true"], ["recompute", "blocks"], []]
)
def test_it_is_not_tried_in_vain(flags, trained, monkeypatch):
    prepare(monkeypatch, Wrong)
    if not flags:
        monkeypatch.undo()
        monkeypatch.setattr(compiling, "DEVICES", ("cpu",))  # 10 steps are not worth it
    _, printed = trained(
        "--diffusion.epochs", 1, *(f"--diffusion.{flags[0]}", flags[1]) if flags else ()
    )
    expected = (
        f"with {flags[0]} = " if flags else "it would take some 240 s and save some 0 s of 5 steps"
    )
    assert "  compiling  is left out" in printed and expected in printed and "failed" not in printed


def train_compiled():
    prepare(pytest.MonkeyPatch())
    torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = 2**15
    DistributedDataParallel.__init__ = partialmethod(
        DistributedDataParallel.__init__, bucket_cap_mb=0.1
    )
    train.main()
    print(len(compiled), "graphs")


def test_two_processes_with_compiled_networks_give_the_losses_of_one(pictures, tmp_path):
    flags = [*FLAGS, "--diffusion.dataset-name", pictures, "--diffusion.batch-size", 4, "--runs"]
    call(train.main, *flags, tmp_path / "one", "--diffusion.gradient-accumulation", 2)
    programs = two(
        tmp_path,
        *flags,
        tmp_path / "two",
        "--diffusion.gradient-accumulation",
        2,
        act=train_compiled,
    )
    assert [program.wait() for program in programs] == [0, 0], programs[0].printed
    assert "a pass takes" in programs[0].printed and "3 graphs" in programs[0].printed
    assert_alike(*(next((tmp_path / name).iterdir()) for name in ("one", "two")))
