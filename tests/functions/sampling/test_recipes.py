"""Recipes: they draw what the same flags draw, a given flag wins, and their errors name them."""

import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

import edit
import evaluate
import functions.sampling.settings
import sample
from functions.sampling.generation import draw
from functions.sampling.settings import SamplingFlags, default_settings
from functions.saved.run_folder import checkpoints_of
from functions.support.command_line import read_flags
from tests.conftest import call, files_of, pixels_of, refused, samples_of

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
FEW = "--device cpu --n 2"


@pytest.fixture
def recipe(tiny_run, details_run, here):
    """Return a recipe whose parts are beside it, a file, a file in a folder, and a run."""
    folder = here / "mine"
    (folder / "guides").mkdir(parents=True)
    early, last = checkpoints_of(tiny_run)
    shutil.copy(last, folder / "model.safetensors")
    shutil.copy(early, folder / "guides" / "early.safetensors")
    (folder / "large").symlink_to(details_run)
    path = folder / "people.toml"
    path.write_text(TEXT)
    return path


def settings(recipe, flags="", **defaults):
    """Return the settings that the flags of sampling give after this recipe, by name."""
    flags = shlex.split(flags)
    begun = SamplingFlags(sampling=default_settings(recipe, **defaults))
    return vars(read_flags(begun, flags).sampling)


def test_a_recipe_draws_what_its_flags_draw(recipe, monkeypatch):
    """So it does without a run, too, and the manifest does not have its name."""
    parts = "mine/model.safetensors --guide mine/guides/early.safetensors --enlarge mine/large"
    call(sample, parts, FLAGS, FEW, "--out flags")
    call(sample, recipe, FEW, "--out recipe")
    assert files_of(Path("recipe")) == files_of(Path("flags"))

    # Samples of the recipe in the box go into the working directory, under its name.
    monkeypatch.setattr(functions.sampling.settings, "PRETRAINED", recipe)
    call(sample, FEW, "--gif")
    [of_the_box] = Path("samples").glob("people-*/grid.png")
    assert of_the_box.read_bytes() == Path("flags/grid.png").read_bytes()
    # The animation has the size of the enlarged images, which the last frame shows. Its palette
    # has few of these colours.
    with Image.open(of_the_box.parent / "denoising.gif") as animation:
        *others, last = ImageSequence.all_frames(animation)
    assert len(others) == 4
    assert np.abs(last.convert("RGB") - pixels_of(of_the_box).astype(float)).mean() < 12


def test_python_draws_by_a_recipe_what_sample_py_draws(recipe):
    call(sample, recipe, FEW, "--individual --seed 3 --out drawn")
    assert np.array_equal(samples_of(Path("drawn")), draw("mine/people.toml", 2, 3, "cpu"))
    call(sample, recipe, FEW, "--individual --temperature 1 --out warm")
    images = draw("mine/people.toml", n=2, device="cpu", temperature=1.0)
    assert np.array_equal(samples_of(Path("warm")), images)


def test_a_run_of_ones_own_comes_before_the_recipe(recipe, tiny_run, monkeypatch, capsys):
    """It is drawn by Algorithm 2 over all timesteps."""
    monkeypatch.setattr(functions.sampling.settings, "PRETRAINED", recipe)
    shutil.copytree(tiny_run, Path("runs") / tiny_run.name)
    call(sample, "--device cpu --n 1")
    printed = capsys.readouterr().out
    assert printed.startswith(f"runs/{tiny_run.name}/checkpoints/step-00000010.safetensors: EMA")
    assert "seed 0, precision float32, sampler ddpm, steps 100, spacing trailing" in printed


@pytest.mark.parametrize(
    "flags, changed",
    [
        (
            "--sampler=ddpm --steps=9 --eta None --seed 3",
            {"sampler": "ddpm", "steps": 9, "eta": None},
        ),
        ("--eta 0 --temperature 1", {"eta": 0.0, "temperature": 1.0}),
        ("--enlarge a b", {"enlarge": ("a", "b")}),
        # Of a flag that is repeated, the last one counts.
        ("--enlarge a --enlarge b", {"enlarge": ("b",)}),
        ("--enlarge", {"enlarge": ()}),
        ("--guide ./3 --guidance -1", {"guide": "./3", "guidance": -1.0}),
        ("--guide None --guidance None", {"guide": None, "guidance": None}),
        ("--cfg None", {}),
        (
            "--label 'a, b' c --cfg 3 --guide None --guidance None",
            {"label": ("a, b", "c"), "cfg": 3.0, "guide": None, "guidance": None},
        ),
    ],
)
def test_a_flag_replaces_a_field_of_the_recipe(recipe, flags, changed):
    assert settings(recipe, flags) == settings(recipe) | changed


@pytest.mark.parametrize(
    "command, settings",
    [
        ("vary 0", "dpm++, steps 4, spacing trailing, eta 1.0, temperature 0.5, guide"),
        ("inpaint 0", "ddpm, steps 50, spacing trailing, variance small, temperature 1.0, guide"),
        ("inpaint 0 --sampler ddim --eta 1 --steps 7", "ddim, steps 7, spacing trailing, eta 1.0"),
    ],
)
def test_edits_use_what_has_a_meaning_for_them(command, settings, recipe, monkeypatch, capsys):
    """All of them use the guide and the enlarger, too."""
    for verb in edit.VERBS:
        monkeypatch.setitem(edit.VERBS, verb, (lambda *_: None, *edit.VERBS[verb][1:]))
    verb, image, *flags = command.split()
    call(edit, verb, image, recipe, *flags, "--device cpu")
    printed = capsys.readouterr().out
    assert f"float32, sampler {settings}" in printed
    assert "guidance 2.0, enlarge (" in printed


def test_export_and_evaluation_use_the_model_alone(recipe, monkeypatch, capsys):
    """Without a run, it is evaluated, too."""
    call(sample, recipe, "--export exported.safetensors")
    monkeypatch.setattr(functions.sampling.settings, "PRETRAINED", recipe)
    call(evaluate, "--images 2 --t-stride 100 --device cpu")
    assert [*Path("evaluation").glob("model-bpd-*.json")]
    printed = capsys.readouterr().out
    assert printed.count(f"{recipe.parent / 'model.safetensors'}: EMA weights") == 2
    assert "guide" not in printed
    assert "enlarged" not in printed


@pytest.mark.parametrize(
    "old, new, sentence",
    [
        ('model = "model.safetensors"', "", r"missing or unknown: model"),
        ('["large"]', '["large", "large/run"]', "there is no .*mine/large/run"),
        ('["large"]', '["large", ""]', "and not empty"),
        # Backslashes in double quotes are a page break, and nothing that TOML has.
        ("'guides/early.safetensors'", r'"runs\faces"', "there is no .*mine/runs"),
        ("'guides/early.safetensors'", r'"guides\early.safetensors"', r"with / and not \\ in"),
        ("steps = 4", "steps = = 4", r"Invalid value \(at line 6"),
        ("steps", "st\udcffeps", "'utf-8' codec can't decode"),
        ("guidance = 2", f"guidance = {'9' * 400}", "guidance is 99.*; it must be finite"),
        ("guidance = 2", f"label = {'[' * 2000 + ']' * 2000}", "maximum recursion depth"),
        ("model.safetensors", "people.toml", "people.toml is a recipe, and no model; name one"),
    ],
)
def test_a_broken_recipe_is_one_sentence(recipe, old, new, sentence):
    recipe.write_bytes(TEXT.replace(old, new).encode(errors="surrogateescape"))
    with refused(sentence) as error:
        call(sample, recipe, FEW)
    assert "people.toml" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_byte_order_mark_and_what_is_no_file_are_read(recipe, monkeypatch):
    """The guide is a step of the model's own run, and ~ the home folder."""
    recipe.write_bytes(b"\xef\xbb\xbf" + TEXT.replace("'guides/early.safetensors'", "5").encode())
    assert settings(recipe)["guide"] == 5
    recipe.write_text('model = "large"\nenlarge = "large"\nbatch-size = 3')
    # A text is a list of one, and - and _ are equal in keys.
    large = str(recipe.parent / "large")
    expected = {"model": large, "batch_size": 3, "enlarge": (large,), "sampler": "ddpm"}
    # The page has another default sampler than a recipe without one.
    assert settings(recipe, sampler="dpm++").items() >= expected.items()
    assert settings(recipe.parent / "large", sampler="dpm++")["sampler"] == "dpm++"
    monkeypatch.setenv("HOME", str(recipe.parent))
    recipe.write_text('model = "~/large"')
    assert settings(recipe)["model"] == large
