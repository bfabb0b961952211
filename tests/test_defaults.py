"""Flags begin with a whole config, and replace fields of it.

The config is that of a preset, a checkpoint, the weights of --init, a recipe, or a verb of edit.py.
tests/test_bad_input.py has values that do not fit.
"""

from unittest import mock

import pytest

import edit
import sample
from functions.training.opening import open_run
from tests.conftest import call, words

RECIPE = 'model = "{run}"\nsampler = "dpm++"\nsteps = 4\ntemperature = 0.5\n'


@pytest.mark.parametrize(
    "script, before, own, flags, changes",
    [
        (
            "train.py",
            "faces --diffusion.dataset-name {pictures} --diffusion.batch-size 9",
            {"snapshot_every": 125, "batch_size": 9, "objective": "eps"},
            "--diffusion.snapshot-every 7",
            {"snapshot_every": 7},
        ),
        (
            "train.py",
            "--resume {stopped}",
            {"epochs": 2, "timesteps_diff": 100},
            "--diffusion.epochs 3",
            {"epochs": 3},
        ),
        (
            "train.py",
            "faces-v --init {run} --diffusion.dataset-name {pictures}",
            # Network and schedule are those of the weights, and all else is the preset's.
            {"epochs": 70, "timesteps_diff": 100, "objective": "eps", "beta_schedule": "linear"},
            "--diffusion.epochs 3",
            {"epochs": 3},
        ),
        (
            sample,
            "{recipe}",
            {"sampler": "dpm++", "steps": 4, "temperature": 0.5, "eta": None},
            "--steps 9",
            {"steps": 9},
        ),
        (
            edit,
            "inpaint 0 {recipe}",
            {"sampler": "ddpm", "steps": 50, "temperature": 1.0, "eta": None},
            "--sampler ddim --eta 1 --steps 7",
            {"sampler": "ddim", "steps": 7, "eta": 1.0},
        ),
    ],
    ids=["preset", "checkpoint", "init", "recipe", "verb"],
)
def test_a_field_is_that_of_the_config_or_of_its_flag(
    script, before, own, flags, changes, tiny_run, stopped_run, pictures, tmp_path
):
    recipe = tmp_path / "mine.toml"
    recipe.write_text(RECIPE.format(run=tiny_run))
    before = before.format(run=tiny_run, stopped=stopped_run, pictures=pictures, recipe=recipe)

    def fields(*after):
        if script == "train.py":
            dry = "--device cpu --dry-run --runs", tmp_path / "runs"
            with open_run(words(before, *after, *dry), "") as (run, _):
                return vars(run.config)
        opening = mock.patch.object(script, "open_pipeline", side_effect=KeyboardInterrupt)
        with opening as opened, pytest.raises(KeyboardInterrupt):
            call(script, before, *after)
        return vars(opened.call_args.args[0].sampling)

    without = fields()
    assert without | own == without
    assert fields(flags) == without | changes
