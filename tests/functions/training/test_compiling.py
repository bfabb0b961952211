"""A compiled training.

The CPU stands in for the GPU, and a stub for the compiler that writes kernels.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from functions.training.metrics import read_metrics
from tests.small_training import training_run


def use_stub(patch):
    """Let torch.compile use a stub on the CPU; return a list that gets each graph it is given."""
    backend = CompileCounterWithBackend("eager")
    torch.compiler.reset()
    patch.setattr("functions.training.run.COMPILED_DEVICES", ("cpu",))
    patch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    return backend.graphs


@pytest.mark.slow
def test_a_run_is_compiled_once_and_validates_and_samples_without(trained, monkeypatch):
    """Validations and grids have other sizes, for which the compiler would work again."""
    graphs = use_stub(monkeypatch)
    run = trained("--diffusion.compile true")
    assert len(graphs) == 1
    first, *_, last = read_metrics(run / "metrics.csv")
    assert last["loss"] < first["loss"]


def test_nothing_is_compiled_on_a_cpu_or_if_the_run_is_deterministic(monkeypatch):
    assert not training_run(compile=True).is_to_compile
    use_stub(monkeypatch)
    run = training_run(compile=True)
    assert run.is_to_compile
    assert "cpu, compiled in the first step" in run.describe()
    run.config = replace(run.config, deterministic=True)
    assert not run.is_to_compile
