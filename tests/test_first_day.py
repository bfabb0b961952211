"""The script of the first day on a GPU, on a machine without one, where all of it runs small."""

import json

import pytest
import torch

from benchmarks import first_day_on_a_gpu as first_day

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there it takes 8 minutes"),
]


def test_each_part_finds_what_it_is_to_find(monkeypatch):
    # The CPU's algorithms are deterministic anyway, and the setting would remain for other tests.
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda _: None)

    facts = {}
    # The last part wants several GPUs.
    for part in list(first_day.PARTS)[:-1]:
        facts.update(first_day.PARTS[part][0]())

    assert facts["float32: a loss beside the CPU's"] == 0.0
    assert facts["a resumed run"]
    for name in ("ours, eager", "ours, compiled", "diffusers, eager", "diffusers, compiled"):
        for base in (64, 128):
            assert facts[f"{name}, base {base}: ms a step"] > 0
    assert first_day.ESTIMATES.keys() <= facts.keys()
    assert not first_day.PARTS.keys() & facts.keys()


def test_a_part_that_fails_or_takes_too_long_does_not_stop_the_others(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        first_day, "PARTS", {"none": (None, 60), "sampling": (None, 0.1), "all GPUs": (None, 200)}
    )

    first_day.main()

    facts = json.loads((tmp_path / "first_day.json").read_text())
    expected = {
        "none": "failed",
        "sampling": "skipped: time",
        "all GPUs": "done",
        "torchrun with 2": "finished",
    }
    assert facts == expected
    assert "KeyError: 'none'" in capsys.readouterr().out
