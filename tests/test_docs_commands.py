"""Every command line and block of Python in README, docs/ and the cards: it runs, or is parsed."""

import re
import shlex
import shutil
from contextlib import redirect_stdout
from functools import cache
from importlib import import_module
from io import StringIO

import pytest

from config import EXPERIMENTS
from functions.super_resolution import enlarging
from tests.conftest import ROOT, call, split_folder
from tests.test_docs import PAGES

PROGRAMS = r"(?:\S*python3?|torchrun|\S*pip)"
# Programs of others, and words of ours in place of which a reader has his own.
THEIRS = r"pip install|-m (pip|venv|pytest)|torchrun| -c |path/to/|download_ffhq|\.\.\."
# What a command needs that a test has not: a pattern of it -> why it is parsed and not run. A
# command of no row is run.
NEEDS = {
    r"pip install|-m venv|--download|google/|evaluate.py images": "the network",
    r"torchrun|first_day_on_a_gpu|--device cuda": "GPUs",
    r"train.py (ffhq|cifar10|mnist$)(?!.*--init)|prepare.py FFHQ|figures.pretrained": "a data set",
    r"(runs|mine)/people.toml|(rehearsal|tuned|runs)/ffhq|--guide STEP|--label": "a longer run",
    r"-m pytest|tests.kill": "minutes",
    r"example.py": "less time: tests/test_example.py runs it",
    r"demo.py": "a browser",
    r"--inputs wanted": "a network of one's own: test_docs.py runs it",
    r"\.\.\.|path/to/script|download_ffhq|VERB|(edit|prepare)\.py$": "words of the reader's own",
}
# Flags that make a command small. The last of two equal flags is the one that counts.
SHORT = (
    "--diffusion.batch-size 2 --diffusion.gradient-accumulation 1 --diffusion.epochs 1 "
    "--diffusion.sample-every 0 --diffusion.validation-samples 2 --device cpu"
)
NARROW = "--model.base-dim 8 --model.norm-groups 2"
SMALL = {
    "sample.py": "--n 1 --steps 2 --device cpu",
    "vary": "--steps 2 --depths 0.5 --device cpu",
    "inpaint": "--n 1 --steps 2 --resample 1 --device cpu",
    "enlarge": "--device cpu",
}
# The first arguments after which a script has other flags.
VERBS = ("bits", "interpolate", "vary", "inpaint", "enlarge", "distance", "images")


def commands_of(page):
    """Return the commands in a page's indented lines, and those in backticks in its sentences."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    text = text.replace("\\\n", " ")
    lines = re.findall(r"^    (.*)$", text, re.MULTILINE)
    lines += [" ".join(quoted.split()) for quoted in re.findall(r"`([^`]+)`", text)]
    parts = [part for line in lines for part in re.split(r"  +#| && |; do ", line)]
    found = (re.match(rf" *(?:until |timeout \d+ )?({PROGRAMS} .+)", part) for part in parts)
    return [" ".join(match[1].split()) for match in found if match]


# Some stand on several pages.
COMMANDS = sorted({command for page in PAGES for command in commands_of(page)})


@cache
def help_of(*command):
    """Return what `python COMMAND --help` prints."""
    script, *verb = command
    module = import_module(script.removesuffix(".py").replace("/", "."))
    printed = StringIO()
    with redirect_stdout(printed), pytest.raises(SystemExit, match="0"):
        call(module, *verb, "--help")
    return printed.getvalue()


def needed(command):
    return next((why for pattern, why in NEEDS.items() if re.search(pattern, command)), None)


def test_commands_are_found_and_each_reason_is_needed():
    assert len(COMMANDS) > 40
    assert sum(needed(command) is None for command in COMMANDS) > 15
    for pattern in NEEDS:
        assert any(re.search(pattern, command) for command in COMMANDS), pattern


@pytest.mark.parametrize("command", COMMANDS)
def test_the_words_of_a_command_exist(command):
    """Its script, flags and preset, and the files that it names."""
    for file in re.findall(r"requirements[\w-]*\.txt|pretrained/[\w.-]+", command):
        assert (ROOT / file).exists(), file
    found = re.search(r"((?:[a-z]+/)?\w+\.py)(?: (.*))?$", command)
    if not found or not (ROOT / found[1]).exists():
        module = re.search(r"-m (\w[\w.]+)", command)
        assert re.search(THEIRS, command) or import_module(module[1])
        return
    script, words = found[1], shlex.split(found[2] or "")
    if script == "train.py" and words and not words[0].startswith("-") and words[0] != "NAME":
        assert words[0] in EXPERIMENTS
    verb = words[:1] if words and words[0] in VERBS else []
    for flag in (word.split("=")[0] for word in words if word.startswith("--")):
        assert flag in help_of(script, *verb), flag


@pytest.mark.slow
@pytest.mark.parametrize("command", [each for each in COMMANDS if not needed(each)])
def test_a_command_runs(
    command, pictures, labelled_pictures, tiny_run, stopped_run, here, monkeypatch
):
    monkeypatch.setattr(enlarging, "ENLARGING_STEPS", 1)
    (here / "pretrained").symlink_to(ROOT / "pretrained")
    shutil.copytree(stopped_run, here / "runs" / stopped_run.name)
    things = {"RUN": tiny_run, "NAME": "faces", "digits.zip": labelled_pictures}
    things |= dict.fromkeys(("FILE", "A", "MASK"), pictures / "00000.png")
    few = split_folder(pictures, here / "few", 3, 2)
    things |= {"DATA": pictures, "path/to/images": few}
    _, script, *words = shlex.split(command)
    # What is drawn goes to a new folder.
    if script != "sample.py":
        things["FOLDER"] = pictures
    if script == "-c":
        return exec(words[0], {})
    flags = SMALL.get(words[0] if script == "edit.py" else script, "")
    if script == "train.py" and "--resume" not in words:
        flags += SHORT if "--init" in words else f"{SHORT} {NARROW}"
        if "digits.zip" not in words:
            flags += f" --diffusion.dataset-name {few}"
    call(import_module(script.removesuffix(".py")), *(things.get(w, w) for w in words), flags)
