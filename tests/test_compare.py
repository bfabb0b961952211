"""benchmarks/: arms that learn, that take turns and that fail, and the feeding of data."""

import re
from dataclasses import replace

import pytest
import torch

from benchmarks import compare, data_feeding
from benchmarks.compare import FFHQ, Bench, all_arms
from tests.conftest import CPU, SMALL_MODEL, call

ARMS = all_arms("float32", CPU)
PACKAGES = ("ours", "diffusers", "lucidrains")
SMALL = replace(FFHQ, **SMALL_MODEL)


# This is slow, as it imports the peers.
@pytest.mark.slow
def test_every_arm_learns_and_ours_and_diffusers_are_of_one_size(monkeypatch):
    facts = {}
    compiled = []

    def pretended_compile(module, dynamic):
        compiled.append(module)
        return module

    monkeypatch.setattr(compare, "TURN_SECONDS", 0)
    # Real compilation takes a minute.
    monkeypatch.setattr(torch, "compile", pretended_compile)

    for name, arm in ARMS.items():
        bench = Bench(arm, SMALL, 2, CPU)
        before = [parameter.clone() for parameter in bench.module.parameters()]
        facts[name] = bench.facts()
        assert not any(map(torch.equal, before, bench.module.parameters())), name
        assert set(bench.turn()) == {"step", "call"}

    # Our network is compiled on CUDA only, where training and sampling have the same layout.
    on_cuda = all_arms("bfloat16", torch.device("cuda"))
    assert on_cuda.keys() ^ ARMS.keys() == {"ours-compiled", *(f"{p}-sampling" for p in PACKAGES)}

    sizes = {facts[name]["parameters"] for name in facts if not name.startswith("lucidrains")}
    assert len(sizes) == 1
    # Kept bytes are not counted in the two arms that compile.
    assert len(compiled) == 2
    assert [fact["kept"] for fact in facts.values()].count(None) == 2
    # It is the same network, so both keep nearly the same.
    assert facts["ours"]["kept"] == pytest.approx(facts["diffusers"]["kept"], rel=0.01)


@pytest.mark.slow
def test_data_feeding(capsys):
    call(data_feeding.main, "--photos", 24, "--batch-size", 8, "--workers", 1, "--rounds", 1)

    printed = capsys.readouterr().out
    assert "24 photos, batches of 8" in printed
    assert len(re.findall(r"[1-9].* images/s", printed)) == 5
