"""Guidance by a run's snapshots: which file is the guide, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest

import sample
from functions.sampling.models import guide_path
from functions.saved.checkpoint import load_weights
from functions.saved.run_folder import checkpoints_of
from tests.conftest import call, refused, train_tiny

FEW = "--sampler dpm++ --steps 3 --n 2 --device cpu --individual"


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    """Return a finished run of 10 steps, with snapshots of steps 4, 8 and 10."""
    runs = tmp_path_factory.mktemp("guided")
    return train_tiny(pictures, runs, "--diffusion.snapshot-every 4")


def test_guide_is_the_file_of_this_step_or_a_path(run, tmp_path, monkeypatch):
    """A snapshot comes before a checkpoint, and a number is a step beside a folder of this name."""
    monkeypatch.chdir(tmp_path)
    Path("8").mkdir()
    saved = load_weights(checkpoints_of(run)[-1])
    for step, file in (
        (4, "snapshots/step-00000004"),
        (5, "checkpoints/step-00000005"),
        (8, "snapshots/step-00000008"),
        (10, "snapshots/step-00000010"),
    ):
        assert guide_path(step, saved) == run / f"{file}.safetensors"
    assert guide_path("8", saved) == Path("8")
    for step in (0, 7, 99):
        with refused(f"no snapshot or checkpoint of step {step} .* of steps 4, 5, 8, 10"):
            guide_path(step, saved)
    model = shutil.copy(saved.path, tmp_path / "faces.safetensors")
    with refused("it is in no run.*name one of these, or the file of a model"):
        call(sample, model, FEW, "--guide 4")


def test_the_manifest_holds_the_guide_and_its_weight(run, tmp_path, capsys):
    """Files of one guide are never taken for those of another, or of none."""
    call(sample, run, FEW, "--guide 4 --out", tmp_path)
    snapshot = checkpoints_of(run, "snapshots")[0]
    assert f"guide {snapshot}: " in capsys.readouterr().out
    facts = json.loads((tmp_path / "samples.json").read_text())
    digest = load_weights(snapshot).digest[:16]
    assert facts.items() >= {"guide": digest, "guidance": 1.5}.items()


@pytest.mark.parametrize(
    "flags",
    ["--diffusion.timesteps-diff 50", "--model.image-size 8 --model.dim-multiply 1"],
)
def test_a_guide_of_another_shape_or_schedule_is_refused(run, trained, flags):
    flags += " --model.transformer-layers 0 --diffusion.epochs 1"
    with refused(r"another shape of images, or another noise schedule"):
        call(sample, run, FEW, "--guide", trained(flags))
