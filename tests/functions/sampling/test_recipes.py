"""Recipes: they draw what the same flags draw, a given flag wins, and their errors name them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import edit
import evaluate
import sample
import sampleFFHQ
import train
from functions.sampling import recipes
from functions.sampling.options import add_sampling_flags
from functions.saved import run_folder
from functions.saved.run_folder import checkpoints_of
from functions.support.command_line import Parser
from functions.support.errors import CheckpointError
from tests.conftest import TINY, call, pixels_of, refused, train_tiny, words

SIZE = "--model.image-size 32 --model.lowest-resolution-size 16"
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


@pytest.fixture(scope="module")
def large_run(pictures, tmp_path_factory):
    """Return a run like `tiny_run` of images of twice the size."""
    return train_tiny(pictures, tmp_path_factory.mktemp("large"), SIZE)


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
    capsys.readouterr()
    call(sample, FEW)
    [of_the_box] = Path("samples").glob("*/grid.png")
    assert of_the_box.read_bytes() == before
    taken = "no run with a checkpoint here yet; using pretrained/people.toml"
    assert taken in capsys.readouterr().out
    call(sampleFFHQ, FEW)
    printed = capsys.readouterr().out
    assert "no run of an experiment ffhq* with a checkpoint here yet; using pretrained/" in printed
    assert "python train.py ffhq-64)" in printed
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
        ("--sampler ddim", OTHER | {"sampler": "ddim"}),
        ("--sampler=ddpm --steps=9", OTHER | {"sampler": "ddpm", "steps": 9}),
        ("--eta 0.5", {"eta": 0.5}),
        ("--eta 0", {"eta": 0.0, "temperature": 1.0}),
        ("--enlarge a --enlarge b", {"enlarge": [Path("a"), Path("b")]}),
        ("--guide 3", {"guide": "3"}),
        ("--guidance 3", {"guidance": 3.0}),
        ("--label a --cfg 3", {"label": ("a",), "cfg": 3.0, "guide": None, "guidance": None}),
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


BROKEN = {
    "steps": ("steps = 1.5", "people.toml: argument --steps: '1.5' is not an integer"),
    "eta": ('eta = "0.5"', "eta cannot be the text '0.5'; write a number"),
    "temperature": ("temperature = nan", "argument --temperature: 'nan' is not a number from 0"),
    "sampler": ('sampler = "euler"', "argument --sampler: invalid choice: 'euler'"),
    "spacing": ("spacing = true", "people.toml: spacing cannot be True"),
    "enlarge": ("enlarge = [true]", "people.toml: enlarge cannot be True"),
    "guide": ('guide = ["a"]', "people.toml: guide cannot be ['a']"),
    "guidance": ("guidance = {}", "people.toml: guidance cannot be {}"),
    "model": ("model = 3", "people.toml: model is '3', and there is no "),
    "seed": ("seed = 3", "people.toml: unrecognized arguments: --seed=3"),
    "device": ('device = "cpu"', "unrecognized arguments: --device=cpu"),
    "checkpoint": ('checkpoint = "a"', "unrecognized arguments: --checkpoint=a"),
}


@pytest.mark.parametrize("key", BROKEN)
def test_a_wrong_value_is_one_sentence_with_the_file_and_the_key(recipe, key):
    line, sentence = BROKEN[key]
    lines = [each for each in TEXT.splitlines() if not each.startswith(f"{key} ")]
    recipe.write_text("\n".join([*lines, line]))
    with refused(f"^{recipe}: ") as error:
        call(sample, recipe)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "old, new, sentence",
    [
        (
            'model = "model.safetensors"\n',
            "",
            "people.toml: the following arguments are required: --model",
        ),
        ("model.safetensors", "other.safetensors", "model is 'other.safetensors', and there is no"),
        (
            '["large"]',
            '["large", "large/run"]',
            "enlarge is 'large/run', and there is no",
        ),
        (
            "'guides/early.safetensors'",
            "'guides\\early.safetensors'",
            "guide is .*; write / between",
        ),
        ("'guides/early.safetensors'", '"guides\\\\early.safetensors"', "guide is .*; write / bet"),
        ("'guides/early.safetensors'", '"runs\\faces"', "guide is .*; write / between"),
        ("'guides/early.safetensors'", '"guides\\early.safetensors"', "with / and not"),
        ("steps = 4", "steps = = 4", r"people.toml: Invalid value \(at line 6"),
        ("steps = 4", "steps = 4\nsteps = 5", "people.toml: Cannot overwrite a value"),
        ("steps", "st\udcffeps", "'utf-8' codec can't decode"),
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


@pytest.mark.parametrize("flag", ["--guide", "--enlarge"])
def test_a_recipe_is_no_part_of_another_drawing(recipe, tiny_run, flag):
    with refused("people.toml is a recipe, and no model", CheckpointError):
        call(sample, tiny_run, flag, recipe, FEW)


def test_a_training_does_not_begin_with_a_recipe(recipe, pictures):
    with refused("people.toml is a recipe, and no model", CheckpointError):
        call(train, "--diffusion.dataset-name", pictures, TINY, "--init", recipe)
    with refused("none.toml: there is no such file", CheckpointError):
        call(sample, "none.toml")


def test_a_byte_order_mark_and_what_is_no_file_are_read(recipe):
    """The guide is a step of the model's own run, and another model is on a hub."""
    recipe.write_bytes(b"\xef\xbb\xbf" + TEXT.replace("'guides/early.safetensors'", "5").encode())
    assert parsed(recipe).guide == "5"
    recipe.write_text('model = "google/ddpm-cifar10-32"')
    assert parsed(recipe).checkpoint == Path("google/ddpm-cifar10-32")
    assert parsed(recipe).enlarge == []
    # The page has another default sampler than a recipe without one.
    assert parsed(recipe, sampler="dpm++").sampler == "ddpm"
