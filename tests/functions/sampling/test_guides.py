"""Guidance by a run's snapshots: which file is the guide, and what is refused."""

import shutil
from pathlib import Path

import pytest

import sample
from functions.sampling.models import guide_path
from functions.saved.checkpoint import load_weights
from functions.saved.run_folder import checkpoints_of
from tests.conftest import call, refused

FEW = "--sampler dpm++ --steps 3 --n 2 --device cpu --individual"


def test_guide_is_the_file_of_this_step_or_a_path(tiny_run, here):
    """A snapshot comes before a checkpoint, and a number is a step beside a folder of this name."""
    Path("5").mkdir()
    saved = load_weights(checkpoints_of(tiny_run)[-1])
    assert guide_path(5, saved) == tiny_run / "checkpoints" / "step-00000005.safetensors"
    assert guide_path(10, saved) == tiny_run / "snapshots" / "step-00000010.safetensors"
    assert guide_path("5", saved) == Path("5")
    with refused("no snapshot or checkpoint of step 7 .* of steps 5, 10"):
        guide_path(7, saved)
    model = shutil.copy(saved.path, here / "faces.safetensors")
    with refused("it is in no run.*name one of these, or the file of a model"):
        call(sample, model, FEW, "--guide 5")


@pytest.mark.parametrize(
    "flags", ["--diffusion.timesteps-diff 50", "--model.image-size 8 --model.dim-multiply 1"]
)
def test_a_guide_of_another_shape_or_schedule_is_refused(tiny_run, trained, flags):
    flags += " --model.transformer-layers 0 --diffusion.epochs 1"
    with refused(r"another shape of images, or another noise schedule"):
        call(sample, tiny_run, FEW, "--guide", trained(flags))
