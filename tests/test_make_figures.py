"""figures/make_figures.py: it draws, from any run, every picture that figures/ has."""

import contextlib
import runpy
import sys
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from figures import make_figures
from tests.conftest import ROOT, call, train_tiny


def run_here(call, check, cwd, env):
    """Run `python -m MODULE ...` in this process, which has imported most of it already."""
    _, _, module, *arguments = map(str, call)
    with contextlib.chdir(cwd), mock.patch.object(sys, "argv", [module, *arguments]):
        runpy.run_module(module, run_name="__main__", alter_sys=True)


@pytest.mark.slow
def test_every_picture_is_drawn_from_a_run_of_eight_steps(
    trained, labelled_pictures, tmp_path, monkeypatch
):
    # The people have 811 training images. The snapshot of step 2 is the guide.
    flags = (
        "--diffusion.dataset-name emoji_people --diffusion.batch-size 100 --diffusion.epochs 1 "
        "--diffusion.snapshot-every 1 --diffusion.timesteps-diff 250"
    )
    run = trained(flags)
    folder = tmp_path / "figures"
    folder.mkdir()
    monkeypatch.setattr(make_figures, "FIGURES", folder)
    monkeypatch.setattr(make_figures.subprocess, "run", run_here)
    size = "--model.image-size 32 --model.lowest-resolution-size 16"
    large = train_tiny("emoji_people", tmp_path / "large", flags, size)
    recipe = tmp_path / "people.toml"
    for path in (recipe, recipe.with_name("people-varied.toml")):
        path.write_text(f'model = "{run}"\nsteps = 2\nenlarge = ["{large}"]')
    monkeypatch.setattr(make_figures, "PRETRAINED", recipe)
    # An inpainting does each step ten times.
    for name in ("GUIDE", "GUIDED"):
        value = getattr(make_figures, name).replace("--guide 3000", "--guide 2")
        monkeypatch.setattr(make_figures, name, value)
    for name, (command, pattern) in make_figures.COMMANDS.items():
        few = command.replace("--steps 50", "--steps 2").replace("--guide 3000", "--guide 2")
        monkeypatch.setitem(make_figures.COMMANDS, name, (few, pattern))
    digits = train_tiny(labelled_pictures, tmp_path / "digits", "--diffusion.labels true")
    call(make_figures, run, run, digits)

    for path in folder.iterdir():
        # It has more than one colour.
        assert np.ptp(np.asarray(Image.open(path).convert("L"))) > 0, path.name
    # `python -m tests.browser` draws the page of demo.py, and benchmarks/same_hour.py its figure.
    others = {"demo-draw.jpg", "same_hour.png"}
    suffixes = (".png", ".jpg", ".webp")
    pictures = {path.name for path in (ROOT / "figures").iterdir() if path.suffix in suffixes}
    assert {path.name for path in folder.iterdir()} == pictures - others
    assert Image.open(folder / "denoising.webp").n_frames > 30
