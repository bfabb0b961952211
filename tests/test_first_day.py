"""The script of the first day on a GPU, on a machine without one, where all of it runs small."""

import json

import pytest
import torch

from benchmarks import first_day_on_a_gpu as first_day

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there it takes 10 minutes"),
]


def test_each_part_finds_what_it_is_to_find(pictures, monkeypatch):
    # The CPU's algorithms are deterministic anyway, and the setting would remain for other tests.
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda _: None)

    # An epoch has 45 steps of one image, and a checkpoint after 25.
    changes = {"dataset_name": str(pictures), "batch_size": 1}
    faces = first_day.EXPERIMENTS["faces"].override(changes, {})
    monkeypatch.setitem(first_day.EXPERIMENTS, "faces", faces)

    facts = {}
    # The last two parts want several processes, which import all they need once more.
    for part in list(first_day.PARTS)[:-2]:
        facts.update(first_day.PARTS[part][0]())

    assert facts["float32: a loss differs from the CPU's by"] == 0.0
    assert facts["a resumed run"]
    for name in ("ours, eager", "ours, compiled", "diffusers, eager", "diffusers, compiled"):
        for base in (64, 128):
            assert facts[f"{name}, base {base}: ms per step"] > 0
    assert first_day.ESTIMATES.keys() <= facts.keys()
    assert not first_day.PARTS.keys() & facts.keys()


def test_a_part_that_fails_or_takes_too_long_does_not_stop_the_others(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        first_day,
        "PARTS",
        {
            "none": (None, 60),
            "sampling": (None, 0.1),
            "DDP": (None, 200),
        },
    )

    first_day.main()

    facts = json.loads((tmp_path / "first_day.json").read_text())
    # These are of all processes together, and differ each time.
    for cut in (True, False):
        assert facts.pop(f"DDP, optimize_ddp = {cut}, base 128: ms per step") > 0
    expected = {
        "none": "failed",
        "sampling": "skipped: time",
        "DDP": "done",
    }
    assert facts == expected
    assert "KeyError: 'none'" in capsys.readouterr().out
