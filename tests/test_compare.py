"""benchmarks/: networks that learn beside ours, and the first day on a GPU in small."""

import json
import subprocess
from dataclasses import replace
from importlib import import_module

import pytest
import torch

from benchmarks import compare
from benchmarks import first_day_on_a_gpu as first_day
from benchmarks.compare import COLUMNS
from config import EXPERIMENTS
from tests.conftest import SMALL_MODEL, call

SMALL = replace(EXPERIMENTS["ffhq-run2"].model, **SMALL_MODEL)


@pytest.mark.slow
def test_a_row_has_all_columns_or_the_error_of_its_process(monkeypatch):
    """tests/models/test_unet.py compares both networks."""
    monkeypatch.setattr(compare, "TURN_SECONDS", 0)
    cells = compare.measure("diffusers", compare.PLAIN, SMALL, 2, 1, "cpu")
    assert cells[0] == "0.1 M"
    # PyTorch alone takes some 0.2 GB.
    assert float(cells[-1]) > 0.1

    failed = compare.row("ours", compare.PLAIN, SMALL, 2, 1, "nowhere")
    assert len(failed) == len(COLUMNS) == len(cells) + 2
    assert "device is 'nowhere'" in failed[2]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there it compiles for minutes")
def test_it_finds_all_facts_and_goes_on_after_a_failure(tmp_path, monkeypatch):
    def broken():
        yield "before the error", 1.0
        raise RuntimeError("no compiler\nfound")

    def in_this_process(command, cwd):
        script, *arguments = command[1:]
        call(import_module(script.removesuffix(".py")), *arguments)
        return 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "call", in_this_process)
    # Each time is that of one call.
    monkeypatch.setattr(compare, "TURN_SECONDS", 0)
    # The other parts do the same with other presets.
    parts = {
        name: first_day.PARTS[name] for name in ("training at base 128", "sampling", "the day")
    }
    monkeypatch.setattr(first_day, "PARTS", {"broken": broken, **parts})

    call(first_day)

    facts = json.loads((tmp_path / "first_day.json").read_text())
    assert facts.pop("broken") == r"failed: RuntimeError('no compiler\nfound')"
    assert "failed" not in str(facts)
    for script in ("train.py", "sample.py"):
        assert facts[f"ffhq-day, exit status of {script}"] == 0
    # Here the compiler only traces, so the gradients are the same.
    assert facts["ffhq-v: a parameter's gradients differ by"] == 0
