"""What README, docs/ and the card of the model name or link to: files, headings and tests."""

import re
from contextlib import redirect_stdout
from functools import cache, partial
from importlib import import_module
from io import StringIO
from itertools import pairwise
from textwrap import dedent

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from functions import enlarging
from functions.training.metrics import read_metrics
from models import networks
from tests.conftest import ROOT, call, newest, normal, only_in, pixels_of, refused

PAGES = [
    ROOT / "README.md",
    ROOT / "data" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "pretrained").glob("*.md")),
]

# The pictures of figures/
KINDS = (".jpg", ".png", ".webp")
# The first arguments after which a script has other flags.
VERBS = ("bits", "interpolate", "vary", "inpaint", "distance", "images")
FOLDERS = ("benchmarks", "data", "extras", "figures", "functions", "models", "tests")
FILES = [*ROOT.glob("*.py"), *(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))]
PATHS = [f"/{path.relative_to(ROOT).as_posix()}" for path in FILES]

for_each = partial(
    pytest.mark.parametrize, "page", ids=lambda page: page.relative_to(ROOT).as_posix()
)


@for_each(PAGES)
def test_what_a_page_names_is_there(page):
    texts = [path.read_text() for path in FILES if path.name.startswith("test_")]
    tests = {path.stem for path in FILES} | {*re.findall(r"def (test_\w+)", "\n".join(texts))}
    for quoted in re.findall(r"`([^`\n]+)`", page.read_text()):
        for file in re.findall(r"^[\w/]+\.py", quoted):
            # A page may leave out a folder that its sentence has named.
            assert any(path.endswith(f"/{file}") for path in PATHS), file
        assert not quoted.startswith("test_") or quoted in tests, quoted


@for_each([*PAGES, ROOT / "CHANGELOG.md"])
def test_what_a_page_links_to_is_there(page):
    """A link leads to a file or a folder and, after a #, to a heading as GitHub names it."""
    for path, anchor in re.findall(r"\]\(([^):#]*)#?([^):]*)\)", page.read_text()):
        target = page.parent / path if path else page
        assert target.exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            names = {
                re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings
            }
            assert anchor in names, f"{path}#{anchor}"


def test_readme_is_one_sitting_with_a_caption_under_each_picture():
    text = (ROOT / "README.md").read_text()
    # As `wc -w` counts.
    assert len(text.split()) <= 1900
    for paragraph, caption in pairwise(text.split("\n\n")):
        if paragraph.startswith(("![", "<img")):
            assert re.match(r"\*[^*\s]", caption), paragraph


def code_of_readme():
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)


def test_readme_quotes_example():
    """Each piece is in example.py, but for the indent and for comments between the lines."""
    *pieces, _ = code_of_readme()
    assert len(pieces) >= 6
    lines = (ROOT / "example.py").read_text().splitlines(keepends=True)
    lines = [line for line in lines if not line.lstrip().startswith("#")]
    for piece in pieces:
        count = piece.count("\n")
        quotes = (dedent("".join(lines[i : i + count])) for i in range(len(lines)))
        assert piece in quotes, piece


@pytest.mark.slow
def test_readmes_lines_of_python_draw_a_grid(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    exec(code_of_readme()[-1], {})
    # There are 2 x 2 images of 32 pixels, with gaps of 2, three times as large.
    assert Image.open("faces.png").size == (210, 210)


def test_pictures_are_light():
    """Each picture that is drawn again stays in the history, too."""
    pictures = [path for path in (ROOT / "figures").iterdir() if path.suffix in KINDS]
    assert len(pictures) > 10
    assert sum(path.stat().st_size for path in pictures) <= 3e6


def run_section(page, heading):
    """Run all lines of code under a heading in docs/, and return the names that they define."""
    section = (ROOT / "docs" / page).read_text().split(f"# {heading}\n")[1].split("\n## ")[0]
    code = re.findall(r"^    (.*)$", section, re.MULTILINE)
    exec("\n".join(code), names := {})
    return names


@pytest.mark.slow
def test_the_script_of_your_own_draws_a_grid_and_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(enlarging, "ENLARGING_STEPS", 1)
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    names = run_section("python.md", "From Python")
    # There are 2 x 2 images, with gaps of 2 pixels.
    assert Image.open("faces.png").size == (2 * 130 + 2,) * 2
    run = names["run"]
    assert read_metrics(run.folder / "metrics.csv")[-1]["step"] == run.total_steps
    assert names["x_0"].shape == (4, 3, 16, 16)


@pytest.mark.slow
def test_conditions_of_your_own_are_trained_dropped_and_drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_section("extending.md", "A condition of your own, from Python")
    network = names["bright"].model.network
    x_t, t = normal(0, 1, 3, 16, 16).expand(200, -1, -1, -1), torch.full((200,), 50)
    light, without = network(x_t, t, torch.ones(200)), network(x_t, t)
    assert (light - without).abs().amax((1, 2, 3)).min() > 1e-3
    # What training drops is what is drawn without it.
    none = torch.full((200,), network.no_inputs["brightness"])
    assert torch.equal(network(x_t, t, none), without)
    larger, small = names["model"], normal(1, 2, 1, 3, 8, 8)
    first, second = (larger.given(small=low).predict(x_t[:1], 50)[0] for low in small)
    assert not torch.allclose(first, second)
    assert names["x_0"].shape == (4, 3, 16, 16)


@pytest.mark.slow
def test_40_attributes_are_trained_resumed_and_drawn_as_the_docs_print(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "extending.md").read_text().split("## 40 attributes")[1]
    blocks = [dedent(block) for block in re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)[:2]]
    network, row = blocks[0].split("# models/networks.py, in NETWORKS\n")
    exec(network, names := {"partial": partial, "unet": networks.unet})
    for name, function in eval(f"{{{row}}}", names).items():
        monkeypatch.setitem(networks.NETWORKS, name, function)
    for steps in (22, 33):
        exec(blocks[1], {})
        assert newest(only_in(tmp_path / "runs"))["run"]["step"] == steps
    saved = newest(only_in(tmp_path / "runs"))
    assert saved["ema"]["attributes.weight"].abs().max() > 0

    def drawn(flags):
        call(sample, f"--device cpu --steps 3 --sampler ddim -n 4 --out {len(flags)}", flags)
        return pixels_of(tmp_path / str(len(flags)) / "grid.png").astype(int)

    plain, given, guided = (
        drawn(flags) for flags in ("", "--inputs wanted.npz", "--inputs wanted.npz --cfg 2")
    )
    assert np.abs(plain - given).max() > 0 and np.abs(given - guided).max() > 0
    attributes = np.load("wanted.npz")["attributes"]
    for arrays, sentence in (
        ({}, "none.npz has none; .* takes attributes"),
        (
            {"attributes": attributes[:, 1:]},
            r"has attributes \(4, 39\); .* takes attributes .N, 40",
        ),
        ({"other": attributes}, "has other"),
        ({"attributes": attributes.astype(str)}, "has attributes"),
    ):
        np.savez("none.npz", **arrays)
        with refused(f"--inputs: none.npz {sentence.removeprefix('none.npz ')}"):
            call(sample, "--device cpu --inputs none.npz")


@cache
def help_of(*command):
    """Return what `python COMMAND --help` prints."""
    script, *verb = command
    module = import_module(script.removesuffix(".py").replace("/", "."))
    printed = StringIO()
    with redirect_stdout(printed), pytest.raises(SystemExit, match="0"):
        call(module, *verb, "--help")
    return printed.getvalue()


@for_each(PAGES)
def test_the_flags_of_a_pages_commands_exist(page):
    for line in re.findall(r"^    (.*\.py .*)$", page.read_text(), re.MULTILINE):
        for script, arguments in re.findall(r"([\w/]+\.py)( [^&#]*)", line):
            words = arguments.split()
            verb = words[:1] if words and words[0] in VERBS else []
            for flag in (word for word in words if word.startswith("--")):
                assert flag in help_of(script, *verb), line
