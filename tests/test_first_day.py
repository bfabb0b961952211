"""The script of the first day on a GPU, on a machine without one, where all of it runs small."""

import json

import pytest
import torch

from benchmarks import compare
from benchmarks import first_day_on_a_gpu as first_day
from tests.conftest import call


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
