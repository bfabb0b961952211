"""figures/make_figures.py: it draws, from any run, every picture that figures/ has."""

import contextlib
from importlib import import_module

import numpy as np
import pytest
from PIL import Image

from figures import make_figures
from tests.conftest import ROOT, call, train_tiny


def run_here(command, check, cwd, env):
    """Run `python -m MODULE ...` in this process, which has imported most of it already."""
    _, _, module, *arguments = command
    with contextlib.chdir(cwd):
        call(import_module(module), *arguments)


@pytest.mark.slow
def test_every_picture_is_drawn_from_small_runs(
    tiny_run, details_run, labelled_pictures, tmp_path, monkeypatch
):
    folder = tmp_path / "figures"
    folder.mkdir()
    monkeypatch.setattr(make_figures, "FIGURES", folder)
    monkeypatch.setattr(make_figures.subprocess, "run", run_here)
    recipe = tmp_path / "people.toml"
    for path in (recipe, recipe.with_name("people-like-photos.toml")):
        path.write_text(f'model = "{tiny_run}"\nsteps = 2\nenlarge = ["{details_run}"]')
    monkeypatch.setattr(make_figures, "PRETRAINED", recipe)

    def for_small_runs(flags):
        # The last number of steps counts.
        return flags.replace("--guide 3000", "--guide 5 --steps 4")

    for name in ("GUIDE", "GUIDED"):
        monkeypatch.setattr(make_figures, name, for_small_runs(getattr(make_figures, name)))
    for name, (command, pattern) in make_figures.COMMANDS.items():
        monkeypatch.setitem(make_figures.COMMANDS, name, (for_small_runs(command), pattern))
    few = "--diffusion.epochs 1 --diffusion.timesteps-diff 20 --diffusion.beta-end 0.01"
    digits = train_tiny(labelled_pictures, tmp_path / "digits", "--diffusion.labels true", few)
    call(make_figures, digits, tiny_run, digits)

    for path in folder.iterdir():
        # It has more than one colour.
        assert np.ptp(np.asarray(Image.open(path).convert("L"))) > 0, path.name
    # example.py draws its own picture, and docs/speed.md names the commit whose script has drawn
    # the other one.
    others = {"example.webp", "same_hour.webp"}
    pictures = {path.name for path in (ROOT / "figures").iterdir() if path.suffix != ".py"}
    assert {path.name for path in folder.iterdir()} == pictures - others - {"__pycache__"}
    # The noise, and the states after each step
    assert Image.open(folder / "denoising.webp").n_frames == 5
