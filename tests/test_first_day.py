"""The script of the first day on a GPU, on a machine without one, where all of it runs small."""

import json

import pytest
import torch

from benchmarks import first_day_on_a_gpu as first_day
from data.pixels import to_model_range
from models.unet import UNet

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
    # The last part wants several processes; "all GPUs" starts them itself.
    for part in list(first_day.PARTS)[:-1]:
        facts.update(first_day.PARTS[part][0]())

    assert facts["float32: a loss differs from the CPU's by"] == 0.0
    assert facts["a resumed run"]
    assert facts["torchrun with 2"] == "finished"
    for name in ("ours, eager", "ours, compiled", "diffusers, eager", "diffusers, compiled"):
        for base in (64, 128):
            assert facts[f"{name}, base {base}: ms per step"] > 0
    assert first_day.ESTIMATES.keys() <= facts.keys()
    assert not first_day.PARTS.keys() & facts.keys()


def test_our_network_gets_images_in_the_one_layout_of_training(monkeypatch):
    """A compiler that sees another layout compiles once more, for minutes."""
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda _: None)
    layouts = set()

    def forward(network, x_t, t, forward=UNet.forward):
        layouts.add((x_t.shape, x_t.stride()))
        return forward(network, x_t, t)

    monkeypatch.setattr(UNet, "forward", forward)

    list(first_day.PARTS["training 64"][0]())

    x_0 = to_model_range(torch.zeros(2, 16, 16, 3, dtype=torch.uint8))
    assert layouts == {(x_0.shape, x_0.stride())}


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
