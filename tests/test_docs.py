"""What README, docs/ and the card of the model name or link to: files, headings and tests."""

import inspect
import json
import math
import re
import shutil
import sys
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from itertools import pairwise
from textwrap import dedent, indent
from unittest.mock import Mock
from unittest.mock import call as call_of

import numpy as np
import pytest
import torch
from PIL import Image

import config
import sample
from config import EXPERIMENTS, DiffusionConfig
from functions import losses, samplers
from functions.denoiser import Denoiser
from functions.noise_scheduler import NoiseScheduler
from functions.super_resolution import enlarging
from functions.support.settings import Presets, setting
from functions.training import metrics, validation
from functions.training.data import training_draws
from functions.training.metrics import MetricsLog, read_metrics
from models import networks, unet
from tests.conftest import ROOT, call, newest, normal, only_in, pixels_of, refused
from tests.small_training import training_run
from train import train

PAGES = [
    ROOT / "README.md",
    ROOT / "data" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "pretrained").glob("*.md")),
]

# The pictures of figures/
KINDS = (".jpg", ".png", ".webp")
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
    assert len(pieces) >= 5
    lines = (ROOT / "example.py").read_text().splitlines(keepends=True)
    lines = [line for line in lines if not line.lstrip().startswith("#")]
    for piece in pieces:
        count = piece.count("\n")
        quotes = (dedent("".join(lines[i : i + count])) for i in range(len(lines)))
        assert piece in quotes, piece


@pytest.mark.slow
def test_readmes_lines_of_python_draw_a_grid(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(enlarging, "ENLARGING_STEPS", 1)
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    exec(code_of_readme()[-1], {})
    # There are 2 x 2 images, with gaps of 2 pixels.
    assert Image.open("faces.png").size == (2 * 130 + 2,) * 2


def test_docs_are_short_and_cards_say_what_a_model_is_for():
    pages = [path.read_text() for path in (ROOT / "docs").glob("*.md")]
    assert sum(text.count("\n") for text in pages) <= 1100
    for card in (ROOT / "pretrained").glob("*-*.md"):
        first, *_ = card.read_text().splitlines()
        assert re.match(rf"# `{card.stem}\.safetensors` (draws|doubles) \w+", first)


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
    assert names["people"].shape == (4, 128, 128, 3)
    run = names["run"]
    assert read_metrics(run.folder / "metrics.csv")[-1]["step"] == run.total_steps
    assert names["x_0"].shape == (4, 3, 16, 16)


@pytest.mark.slow
def test_the_lines_that_show_copies_draw_them(pictures, here):
    text = (ROOT / "docs" / "your-images.md").read_text().split("--out twelve\n")[1]
    (here / "twelve").mkdir()
    for path in sorted(pictures.iterdir())[:12]:
        shutil.copy(path, here / "twelve")
    code = dedent(text).replace("path/to/photos", str(pictures))
    exec(code, {})
    # Each of them is the picture most like itself. Between both rows is a gap of 2 pixels.
    above, below = np.asarray(Image.open("copies.png"))[2:].reshape(2, 130, -1, 3)
    assert above.shape[1] == 12 * 130 + 2
    np.testing.assert_array_equal(above, below)


@pytest.mark.slow
def test_40_attributes_are_trained_resumed_and_drawn_as_the_docs_print(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "extending.md").read_text().split("## A condition: 40 attributes")[1]
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


def pieces_of(heading):
    """Return the code under a heading of docs/extending.md: [the comment with a file, lines]."""
    section = (ROOT / "docs" / "extending.md").read_text().split(f"## {heading}\n")[1]
    code = "\n".join(re.findall(r"^    (.*)$", section.split("\n## ")[0], re.MULTILINE))
    return re.findall(r"^# ([\w/]+\.py, .*)\n((?:(?!# [\w/]+\.py).*\n?)*)", code, re.MULTILINE)


def edited(function, line, code, instead=0):
    """Return a function with code before a line of its source, and in place of some lines."""
    lines = inspect.getsource(function).splitlines()
    [at] = (i for i, each in enumerate(lines) if each.lstrip().startswith(line))
    space = re.match(" *", lines[at])[0]
    lines[at : at + instead] = indent(code, space).splitlines()
    exec("\n".join(lines), names := {**function.__globals__})
    return names[function.__name__]


def test_the_lines_of_weight_decay_decay_weights(here, monkeypatch):
    """One step with them differs from one without by rate x decay x the weights before."""
    (_, field), (_, lines) = pieces_of("A config field")
    names = {"dataclass": dataclass, "DiffusionConfig": DiffusionConfig, "setting": setting}
    body = indent(field, "    ")
    exec(f"@dataclass(frozen=True)\nclass Decaying(DiffusionConfig):\n{body}", names)
    weights = []
    for decay in (0.0, 0.5):
        run = training_run(learning_rate=0.01, warmup_steps=0, epochs=1, batch_size=40)
        before = [parameter.detach().clone() for parameter in run.model.parameters()]
        run.config = names["Decaying"](**vars(run.config), weight_decay=decay)
        edited(train, "optimizer.step()", lines)(run)
        weights.append([parameter.detach() for parameter in run.model.parameters()])
    for first, plain, decayed in zip(before, *weights, strict=True):
        torch.testing.assert_close(decayed, plain - 0.01 * 0.5 * first)


def test_the_lines_of_another_loss_are_trained_and_recorded(here, monkeypatch):
    """Huber's loss, by hand, and a term with a weight are seen by name, of held-out images too."""
    (_, huber), (_, term) = pieces_of("A loss")
    monkeypatch.setattr(losses, "F", torch.nn.functional, raising=False)
    source = inspect.getsource(losses.denoising_loss).splitlines()
    for start, code in (("loss = ", huber), ("return ", term)):
        [at] = (i for i, line in enumerate(source) if line.lstrip().startswith(start))
        source[at : at + 1] = indent(code, "    ").splitlines()
    exec("\n".join(source), names := vars(losses).copy())
    x_0, eps, output = (normal(seed, 5, 3, 8, 8) for seed in (1, 2, 3))
    denoiser = Denoiser(lambda x_t, t: output, NoiseScheduler(1000))
    found = names["denoising_loss"](denoiser, x_0, torch.arange(5), eps)
    d = (output - eps).abs()
    by_hand = torch.where(d < 0.1, d**2 / 0.2, d - 0.05).mean((1, 2, 3))
    colour = (output - eps).mean((2, 3)).square().mean(1)
    torch.testing.assert_close(found["colour"], colour)
    torch.testing.assert_close(found["loss"], by_hand + 0.5 * colour)

    for module in (sys.modules["train"], validation):
        monkeypatch.setattr(module, "denoising_loss", names["denoising_loss"])
    run = training_run(epochs=1, batch_size=20, validation_samples=4, sample_every=0)
    assert train(run)
    [*_, row] = read_metrics(run.folder / "metrics.csv")
    for name in ("loss", "colour", "eps_error"):
        assert all(row[f"{kind}{name}"] > 0 for kind in ("", "val_")) and row[f"val_{name}_ema"] > 0


def test_the_lines_of_other_draws_draw_as_they_say():
    [(_, lines)] = pieces_of("What a step draws")
    draw = edited(training_draws, "t=torch.randint", lines, instead=2)
    config = EXPERIMENTS["faces"].diffusion
    config = replace(config, batch_size=4000)
    draws = draw(config, 0, (3, 4, 4), torch.device("cpu"))
    # The logit of t is standard normal, and the noise of a channel has a mean of deviation 0.1,
    # beside that of its 16 numbers.
    logits = ((draws.t + 0.5) / config.timesteps_diff).logit()
    assert abs(logits.mean()) < 0.06 and abs(logits.std() - 1) < 0.04
    assert abs(draws.noise.mean((2, 3)).std() - math.hypot(0.1, 0.25)) < 0.01


def test_the_row_of_another_optimizer_makes_it(network):
    [(_, row)] = pieces_of("An optimizer")
    rows = eval(f"{{{row}}}", {"torch": torch})
    matrices, others = rows["adamw"](network, 0.5).param_groups
    assert [group["lr"] for group in (matrices, others)] == [0.5, 0.25]
    assert others["weight_decay"] == 0 < matrices["weight_decay"]
    assert sum(len(group["params"]) for group in (matrices, others)) == len([*network.parameters()])


def test_the_lines_of_a_preset_make_it():
    [(_, lines)] = pieces_of("A preset")
    presets = Presets()
    exec(lines, vars(config) | {"EXPERIMENTS": presets})
    made = presets["faces-48"]
    expected = EXPERIMENTS["faces-v"].override(epochs=35, base_dim=48, norm_groups=12)
    assert made == expected


def test_the_lines_of_a_best_checkpoint_keep_it_and_end_the_run(here, monkeypatch):
    """The held-out losses are made up: the second is the best, and five worse ones follow."""
    _, (_, lines) = pieces_of("The best checkpoint, and where a run is logged")
    script = sys.modules["train"]
    losses = iter([3.0, 1.0, *map(float, range(4, 20))])
    monkeypatch.setattr(
        script, "validate", lambda run: {"val_loss": 9.0, "val_loss_ema": next(losses)}
    )
    monkeypatch.setattr(script, "read_metrics", read_metrics, raising=False)
    run = training_run(epochs=20, batch_size=20, validate_every=1, sample_every=0)
    saved = []
    monkeypatch.setattr(run, "save_snapshot", lambda path: saved.append((run.step, path.name)))
    lines = f"recorder.write(row)\n{lines}"
    assert edited(train, "recorder.write(row)", lines, instead=1)(run)
    assert run.step == 7
    assert [step for step, name in saved if name == "best.safetensors"] == [1, 2]


def test_the_lines_of_another_log_get_rows_and_pictures(here, monkeypatch):
    """An object that notes its calls stands in for wandb."""
    (_, lines), *_ = pieces_of("The best checkpoint, and where a run is logged")
    source = inspect.getsource(MetricsLog)
    for line, name in re.findall(r"^(self.*?)  # (\w+)$", lines, re.MULTILINE):
        method = re.search(rf"    def {name}\(.*?(?=\n\n    def|\Z)", source, re.DOTALL)[0].rstrip()
        source = source.replace(method, f"{method}\n        {line}")
    wandb = Mock()
    exec(source, names := vars(metrics) | {"wandb": wandb, "json": json})
    log = names["MetricsLog"](here)
    log.write({"step": 1, "loss": 0.5})
    log.show(Image.new("RGB", (4, 4)), 2)
    log.close()
    logged = wandb.init.return_value
    assert logged.log.call_args_list[0] == call_of({"step": 1, "loss": 0.5}, step=1)
    assert logged.log.call_args_list[1].kwargs == {"step": 2}
    logged.finish.assert_called_once_with()


def test_the_rows_of_tables_fit_them():
    heading = "A learning-rate schedule, an objective, a sampler, betas, a spacing"
    for comment, code in pieces_of(heading):
        file, table = re.match(r"([\w/]+)\.py, (?:in|above) (\w+)", comment).groups()
        # What a row needs may stand above it.
        above, _, row = code.rpartition("# and in it\n")
        module = import_module(file.replace("/", "."))
        names = {**vars(module), "ode_sample": samplers.ddim_sample}
        exec(above, names)
        [(name, value)] = eval(f"{{{row}}}", names).items()
        known = getattr(module, table)
        assert name not in known and type(value) is type(next(iter(known.values())))


def test_the_small_dit_is_a_network():
    (_, code), *_ = pieces_of("Another network: a small DiT")
    exec(code, names := {**vars(unet), "partial": partial})
    network = names["DiT"](16, 3, 64, 4)
    assert network(normal(0, 2, 3, 16, 16), torch.tensor([1, 7])).shape == (2, 3, 16, 16)
