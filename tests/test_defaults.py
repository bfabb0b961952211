"""Flags begin with a whole config, and replace fields of it.

The config is that of a preset, a checkpoint, the weights of --init, a recipe, or a verb of edit.py.
tests/test_bad_input.py has values that do not fit.
"""

from dataclasses import dataclass
from unittest import mock

import pytest

import edit
from functions.sampling.settings import SamplingFlags, default_settings
from functions.support.command_line import read_flags
from functions.training.opening import open_run
from tests.conftest import call, words

RECIPE = 'model = "{run}"\nsampler = "dpm++"\nsteps = 4\ntemperature = 0.5\n'


@dataclass
class Begun:
    """What flags begin with: its words before them, and the fields that it has without them."""

    words: str
    own: dict
    # A flag that changes fields, and their values
    flag: str
    changed: dict


BEGUN = {
    "preset": Begun(
        "faces --diffusion.dataset-name {pictures} --diffusion.batch-size 9",
        {"snapshot_every": 125, "batch_size": 9, "objective": "eps"},
        "--diffusion.snapshot-every 7",
        {"snapshot_every": 7},
    ),
    "checkpoint": Begun(
        "--resume {stopped}",
        {"epochs": 2, "timesteps_diff": 100},
        "--diffusion.epochs 3",
        {"epochs": 3},
    ),
    "init": Begun(
        "faces-v --init {run} --diffusion.dataset-name {pictures}",
        # Network and schedule are those of the weights, and all else is the preset's.
        {"epochs": 70, "timesteps_diff": 100, "objective": "eps", "beta_schedule": "linear"},
        "--diffusion.epochs 3",
        {"epochs": 3},
    ),
    "recipe": Begun(
        "{recipe}",
        {"sampler": "dpm++", "steps": 4, "temperature": 0.5, "eta": None},
        "--steps 9",
        {"steps": 9},
    ),
    "verb": Begun(
        "inpaint 0 {recipe}",
        {"sampler": "ddpm", "steps": 50, "temperature": 1.0, "eta": None},
        "--sampler ddim --eta 1 --steps 7",
        {"sampler": "ddim", "steps": 7, "eta": 1.0},
    ),
}


@pytest.fixture(params=BEGUN)
def read(request, tiny_run, stopped_run, pictures, tmp_path):
    """Return a `Begun`, and a function from flags to the fields of the config that they make."""
    begun = BEGUN[request.param]
    recipe = tmp_path / "mine.toml"
    recipe.write_text(RECIPE.format(run=tiny_run))
    paths = {"run": tiny_run, "stopped": stopped_run, "pictures": pictures, "recipe": recipe}
    before = words(begun.words.format(**paths))

    def fields(flags=""):
        after = words(flags)
        if request.param == "recipe":
            start = SamplingFlags(sampling=default_settings(recipe))
            return vars(read_flags(start, after).sampling)
        if request.param == "verb":
            opening = mock.patch.object(edit, "open_pipeline", side_effect=KeyboardInterrupt)
            with opening as opened, pytest.raises(KeyboardInterrupt):
                call(edit, *before, *after)
            return vars(opened.call_args.args[0].sampling)
        device = "--device", "cpu", "--dry-run", "--runs", str(tmp_path / "runs")
        with open_run([*before, *after, *device], "") as (run, _):
            return vars(run.config)

    return begun, fields


def test_a_field_is_that_of_the_config_or_of_its_flag(read):
    begun, fields = read
    own = fields()
    assert own | begun.own == own
    changed = fields(begun.flag)
    assert changed == own | begun.changed
