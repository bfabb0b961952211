"""benchmarks/: arms that learn, the feeding of data, and the first day on a GPU in small."""

import json
import re
from dataclasses import replace

import pytest
import torch

from benchmarks import compare, data_feeding
from benchmarks import first_day_on_a_gpu as first_day
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


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there it compiles for minutes")
def test_it_finds_all_facts_and_goes_on_after_a_failure(tmp_path, monkeypatch, capsys):
    def broken():
        yield "before the error", 1.0
        raise RuntimeError("no compiler\nfound")

    monkeypatch.chdir(tmp_path)
    # Each time is that of one call.
    monkeypatch.setattr(compare, "TURN_SECONDS", 0)
    monkeypatch.setattr(first_day, "PARTS", {"broken": broken, **first_day.PARTS})

    call(first_day.main)

    facts = json.loads((tmp_path / "first_day.json").read_text())
    printed = capsys.readouterr().out.splitlines()
    assert all(f"{name}: {value}" in printed for name, value in facts.items())
    assert facts.pop("GPU") == "none"
    assert torch.__version__ in facts.pop("PyTorch")
    assert facts.pop("broken") == r"failed: RuntimeError('no compiler\nfound')"
    expected = {"before the error", "faces-quick, muon: steps/s"}
    expected.add("faces-quick, adam: steps/s")
    for precision in ("bfloat16", "float32"):
        expected.add(f"ffhq-v, {precision}: images/s in 1,000 steps")
    for name in ("ffhq-run2", "ffhq-v"):
        # Here the compiler only traces, so the gradients are the same.
        assert facts.pop(f"{name}: a parameter's gradients differ by") == 0
        for mode in ("eager", "compiled"):
            assert facts.pop(f"{name}, {mode}: GB") == 0
            expected |= {f"{name}, {mode}: s of the first pass", f"{name}, {mode}: ms per pass"}
    assert facts.keys() == expected
    assert min(facts.values()) > 0
