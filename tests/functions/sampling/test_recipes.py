"""Recipes: they draw what the same flags draw, a given flag wins, and their errors name them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import edit
import evaluate
import sample
from functions.sampling import recipes
from functions.sampling.options import add_sampling_flags
from functions.saved import run_folder
from functions.saved.run_folder import checkpoints_of
from functions.support.command_line import Parser
from tests.conftest import call, pixels_of, refused, words

TEXT = """\
model = "model.safetensors"
guide = 'guides/early.safetensors'
guidance = 2
enlarge = ["large"]
sampler = "dpm++"
steps = 4
spacing = "trailing"
temperature = 0.5
"""
FLAGS = "--sampler dpm++ --steps 4 --spacing trailing --guidance 2 --temperature 0.5"
# What is left of it for another sampler.
OTHER = {"steps": None, "spacing": None, "temperature": 1.0}
FEW = "--device cpu --n 2"


@pytest.fixture
def recipe(tiny_run, large_run, tmp_path, monkeypatch):
    """Return a recipe whose parts are beside it, a file, a file in a folder, and a run."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "mine"
    (folder / "guides").mkdir(parents=True)
    early, last = checkpoints_of(tiny_run)
    shutil.copy(last, folder / "model.safetensors")
    shutil.copy(early, folder / "guides" / "early.safetensors")
    (folder / "large").symlink_to(large_run)
    path = folder / "people.toml"
    path.write_text(TEXT)
    return path


def parsed(recipe, flags="", **defaults):
    """Return what the flags of sampling are after this recipe."""
    parser = Parser()
    add_sampling_flags(parser)
    parser.set_defaults(**defaults)
    return recipes.parse_drawing(parser, [str(recipe), *words(flags)])


def test_a_recipe_draws_into_one_folder_what_its_flags_draw(recipe, monkeypatch, capsys):
    """So it does without a run, too, and the manifest does not have its name."""
    folder = recipe.parent
    parts = ["--guide", folder / "guides" / "early.safetensors", "--enlarge", folder / "large"]
    call(sample, folder / "model.safetensors", FLAGS, *parts, FEW)
    [drawn] = folder.glob("samples/*/grid.png")
    before = drawn.read_bytes()
    drawn.unlink()
    call(sample, recipe, FEW)
    assert drawn.read_bytes() == before
    assert "people" not in (drawn.parent / "samples.json").read_text()

    # Samples of the models in the box go into the working directory.
    monkeypatch.setattr(run_folder, "PRETRAINED", recipe)
    call(sample, FEW, "--gif")
    [of_the_box] = Path("samples").glob("*/grid.png")
    assert of_the_box.read_bytes() == before
    assert "no run with a checkpoint here yet; using pretrained/" in capsys.readouterr().out
    # The animation has the size of the enlarged images, which the last frame shows.
    with Image.open(of_the_box.parent / "denoising.gif") as animation:
        assert animation.n_frames == 5
        first = np.asarray(animation.convert("RGB"))
        animation.seek(4)
        last = np.asarray(animation.convert("RGB")).astype(float)
    grid = pixels_of(of_the_box)
    assert first.shape == last.shape == grid.shape
    # The palette of the animation has few of these colours.
    assert np.abs(last - grid).mean() < 12 < np.abs(first - grid).mean() / 2


def test_a_run_of_ones_own_comes_before_the_recipe(recipe, tiny_run, monkeypatch, capsys):
    """It is drawn by Algorithm 2 over all timesteps."""
    monkeypatch.setattr(run_folder, "PRETRAINED", recipe)
    shutil.copytree(tiny_run, Path("runs") / tiny_run.name)
    call(sample, "--device cpu --n 1")
    printed = capsys.readouterr().out
    assert printed.startswith(f"runs/{tiny_run.name}/checkpoints/step-00000010.safetensors: EMA")
    assert "sampler ddpm, steps all, spacing trailing, variance small, seed 0, float32" in printed


@pytest.mark.parametrize(
    "flags, changed",
    [
        ("--steps 9 --seed 3", {"steps": 9, "seed": 3}),
        ("--sampler dpm++ --temperature 1", {"temperature": 1.0}),
        # Another sampler drops what was meant for the recipe's.
        ("--sampler=ddpm --steps=9", OTHER | {"sampler": "ddpm", "steps": 9}),
        ("--eta 0.5", {"eta": 0.5}),
        ("--eta 0", {"eta": 0.0, "temperature": 1.0}),
        ("--enlarge a --enlarge b", {"enlarge": [Path("a"), Path("b")]}),
        ("--guide 3", {"guide": "3"}),
        # Names with commas are quoted, as some of ImageNet's.
        (
            '--label "a,b",c --cfg 3',
            {"label": ("a,b", "c"), "cfg": 3.0, "guide": None, "guidance": None},
        ),
    ],
)
def test_a_given_flag_wins_and_takes_along_what_it_makes_void(recipe, flags, changed):
    plain = vars(parsed(recipe))
    assert plain["checkpoint"] == recipe.parent / "model.safetensors"
    assert (plain["sampler"], plain["steps"], plain["guidance"]) == ("dpm++", 4, 2.0)
    assert plain["enlarge"] == [recipe.parent / "large"]
    assert vars(parsed(recipe, flags)) == plain | changed


def test_editing_uses_what_has_a_meaning_for_it(recipe, capsys, monkeypatch, pictures):
    """The names of the folders have hashes, so the printed models and options are compared."""
    shown = []
    for name in edit.VERBS:
        monkeypatch.setitem(edit.VERBS, name, lambda args, drawing, folder: shown.append(drawing))
    of_edits = {
        "vary 0": "dpm++, steps 4, spacing trailing, eta 1.0, temperature 0.5",
        "interpolate 0 1": "dpm++, steps 4, spacing trailing, eta 1.0, temperature 0.5",
        "inpaint a.png": "ddpm, steps 50, spacing trailing, variance small",
        "inpaint --steps 7 a.png": "ddpm, steps 7, spacing trailing, variance small",
        "invert 0": "ddim, steps 100, spacing trailing, eta 0.0",
        "interpolate --exact 0 1": "ddim, steps 100, spacing trailing, eta 0.0",
    }
    for command, options in of_edits.items():
        call(edit, command, recipe, "--device cpu")
        drawing = shown.pop()
        printed = capsys.readouterr().out
        alone = "invert" in command or "--exact" in command
        assert str(drawing.options).startswith(f"sampler {options}")
        assert ("guide " in printed, "enlarged by " in printed) == (not alone, not alone)
        assert len(drawing.enlargers) == (0 if alone else 1)
        assert drawing.options.guidance == (None if alone else 2.0)


def test_export_and_evaluation_use_the_model_alone(recipe, tiny_run, capsys):
    call(sample, recipe, "--export exported.safetensors")
    call(evaluate, "bits", recipe, "--images 2 --t-stride 100 --device cpu")
    printed = capsys.readouterr().out
    assert printed.count(f"{recipe.parent / 'model.safetensors'}: EMA weights") == 2
    assert "guide" not in printed
    assert "enlarged" not in printed


@pytest.mark.parametrize(
    "old, new, sentence",
    [
        ('model = "model.safetensors"', "", "people.toml: the following arguments .*: --model"),
        ("model.safetensors", "other.safetensors", "model is 'other.safetensors', and there is no"),
        ('["large"]', '["large", "large/run"]', "enlarge is 'large/run', and there is no"),
        ("'guides/early.safetensors'", r"'guides\early.safetensors'", "write / between"),
        # Backslashes in double quotes are a page break, and nothing that TOML has.
        ("'guides/early.safetensors'", r'"runs\faces"', "guide is .*; write / between"),
        ("'guides/early.safetensors'", r'"guides\early.safetensors"', "with / and not"),
        ("steps = 4", "steps = = 4", r"people.toml: Invalid value \(at line 6"),
        ("steps", "st\udcffeps", "'utf-8' codec can't decode"),
        ("steps = 4", "steps = 1.5", "people.toml: argument --steps: '1.5' is not an integer"),
        ("steps = 4", 'steps = "4"', "steps cannot be the text '4'; write a number"),
        ("steps = 4", "steps = true", "people.toml: steps cannot be True"),
        ("steps = 4", "seed = 3", "people.toml: unrecognized arguments: --seed=3"),
        ("model.safetensors", "people.toml", "people.toml is a recipe, and no model"),
        ("guides/early.safetensors", "people.toml", "people.toml is a recipe, and no model"),
        ('"large"', '"people.toml"', "people.toml is a recipe, and no model"),
    ],
)
def test_a_broken_recipe_is_one_sentence(recipe, old, new, sentence):
    recipe.write_bytes(TEXT.replace(old, new).encode(errors="surrogateescape"))
    with refused(sentence) as error:
        call(sample, recipe, FEW)
    assert "people.toml" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_byte_order_mark_and_what_is_no_file_are_read(recipe):
    """The guide is a step of the model's own run, and another model is on a hub."""
    recipe.write_bytes(b"\xef\xbb\xbf" + TEXT.replace("'guides/early.safetensors'", "5").encode())
    assert parsed(recipe).guide == "5"
    recipe.write_text('model = "google/ddpm-cifar10-32"')
    assert parsed(recipe).checkpoint == Path("google/ddpm-cifar10-32")
    assert parsed(recipe).enlarge == []
    # The page has another default sampler than a recipe without one.
    assert parsed(recipe, sampler="dpm++").sampler == "ddpm"
