"""evaluate.py: its verbs, and bits/dim from the command line to the file."""

import json
import shutil

import pytest
import torch

import evaluate
from tests.conftest import call, files_of

BPD = "--t-stride 100 --device cpu"


@pytest.mark.slow
def test_bits_per_dim_of_a_run(tiny_run, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    out = tmp_path / "out"
    call(evaluate, "--runs", tiny_run.parent, BPD, "--out", out)
    assert not torch.backends.cudnn.allow_tf32
    printed = capsys.readouterr().out
    first = files_of(out)
    [name] = first
    assert name.startswith("step-00000010-bpd-")

    result = json.loads(first[name])
    assert result["bits_per_dim"] == pytest.approx(result["rate"] + result["distortion"])
    assert result["standard_error"] > 0
    assert f"{result['bits_per_dim']:.4f}" in printed
    assert json.dumps(result["settings"]) in printed
    assert result["settings"]["images"] == 4

    # The same command again writes the same, bit for bit, and other settings add a file.
    call(evaluate, tiny_run, BPD, "--out", out)
    assert files_of(out) == first
    assert "WARNING" not in capsys.readouterr().err
    ignored = shutil.ignore_patterns("0000*", "*.packed*")
    fewer = shutil.copytree(pictures, tmp_path / "fewer", ignore=ignored)
    other = ["--images 2 --bpd-variance large --data", fewer]
    call(evaluate, "bits", tiny_run, BPD, *other, "--out", out)
    both = files_of(out)
    assert len(both) == 2
    assert first.items() < both.items()
    assert "MAY NOT BE THE DATA IT WAS TRAINED ON" in capsys.readouterr().err
