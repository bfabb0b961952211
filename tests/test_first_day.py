"""The first day's script on a machine without a GPU, where all of it runs small."""

import json

import pytest
import torch

from benchmarks import first_day_on_a_gpu as first_day

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there it takes 8 minutes"),
]


def test_each_part_finds_what_it_is_to_find(monkeypatch):
    # The CPU's are; no other test wants it
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda _: None)
    found = {
        what: fact
        for part in list(first_day.PARTS)[:-1]
        for what, fact in first_day.PARTS[part][0]()
    }
    assert found["float32: a loss beside the CPU's"] == 0.0 and found["a resumed run"]
    names = [
        f"{package}, {how}" for package in ("ours", "diffusers") for how in ("eager", "compiled")
    ]
    assert all(found[f"{name}, base {base}: ms a step"] > 0 for name in names for base in (64, 128))
    assert first_day.ESTIMATES.keys() <= found.keys() and not first_day.PARTS.keys() & found.keys()


def test_a_part_that_fails_or_takes_too_long_does_not_stop_the_others(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        first_day, "PARTS", {"none": (None, 60), "sampling": (None, 0.1), "all GPUs": (None, 200)}
    )
    first_day.main()
    found = json.loads((tmp_path / "first_day.json").read_text())
    expected = {
        "none": "failed",
        "sampling": "skipped: time",
        "all GPUs": "done",
        "torchrun with 2": "finished",
    }
    assert found == expected
    assert "KeyError: 'none'" in capsys.readouterr().out
