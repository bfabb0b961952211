"""benchmarks/: networks that learn beside ours, and the first day on a GPU in small."""

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import compare, same_hour
from benchmarks import first_day_on_a_gpu as first_day
from benchmarks.compare import COLUMNS, PACKAGES, SETTINGS, Bench
from config import EXPERIMENTS
from data.datasets import load_images
from functions.support.pictures import save_image
from tests.conftest import CPU, SMALL_MODEL, TRAINED, call

SMALL = replace(EXPERIMENTS["ffhq-run2"].model, **SMALL_MODEL)


# This is slow, as it imports the peers.
@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES)
def test_every_network_learns_and_ours_and_diffusers_are_of_one_size(package, monkeypatch):
    compiled = []

    def pretended_compile(module, dynamic):
        compiled.append(module)
        return module

    monkeypatch.setattr(compare, "TURN_SECONDS", 0)
    # Real compilation takes a minute.
    monkeypatch.setattr(torch, "compile", pretended_compile)

    for settings in SETTINGS:
        bench = Bench(package, settings, SMALL, 2, CPU)
        for _ in range(2):
            before = [parameter.clone() for parameter in bench.module.parameters()]
            assert min(bench.turn()) > 0
            assert not any(map(torch.equal, before, bench.module.parameters()))
    assert len(compiled) == 1

    size = sum(parameter.numel() for parameter in bench.module.parameters())
    ours = sum(parameter.numel() for parameter in compare.build("ours", SMALL).parameters())
    assert (size == ours) == (package != "lucidrains")


@pytest.mark.slow
def test_a_row_is_measured_in_a_process_of_its_own_and_may_fail():
    cells = compare.row("ours", compare.PLAIN, SMALL, 2, 1, "cpu")
    assert len(cells) == len(COLUMNS)
    assert cells[:3] == ["ours", compare.PLAIN, "0.1 M"]
    step, call_seconds, peak = (float(cells[k]) for k in (3, 5, 7))
    assert min(step, call_seconds) > 0
    # PyTorch alone takes some 0.2 GB.
    assert 0.1 < peak < 5

    failed = compare.row("ours", compare.PLAIN, SMALL, 2, 1, "nowhere")
    assert len(failed) == len(COLUMNS)
    assert "device is 'nowhere'" in failed[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ours, faces-v", "diffusers", "lucidrains"])
def test_a_program_is_timed_and_draws_on_the_way(name, pictures, tmp_path, monkeypatch):
    """An epoch of the 46 training images has two steps of 16. Drawing takes no time."""
    small = replace(SMALL, base_dim=16)
    monkeypatch.setattr(same_hour, "MODEL", small)
    monkeypatch.setattr(same_hour, "SIZE", small.image_size)
    monkeypatch.setattr(same_hour, "SAMPLES", 3)
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, image in enumerate(load_images(str(pictures), 16).images[TRAINED]):
        # lucidrains' Trainer wants 100 images.
        for copy in range(1 if "ours" in name else 3):
            save_image(image, photos / f"{i}-{copy}.png")

    clock = [0.0]
    monkeypatch.setattr(same_hour, "cpu_seconds", lambda: clock[0])
    program = same_hour.PROGRAMS[name]

    def a_minute_a_step(data, photos, steps, after_step):
        def minute_later(step, draw):
            clock[0] += 60
            after_step(step, partial(draw_for_an_hour, draw))

        def draw_for_an_hour(draw, n):
            clock[0] += 3600
            return draw(n)

        program(data, photos, steps, minute_later)

    monkeypatch.setitem(same_hour.PROGRAMS, name, a_minute_a_step)
    rows = same_hour.draw_on_the_way(name, str(pictures), photos, 8)
    assert [minutes for minutes, _ in rows] == [1, 2, 4, 8]
    for _, samples in rows:
        assert samples.shape == (3, 16, 16, 3)
        assert np.ptp(samples) > 0

    np.save(tmp_path / f"{name}.npy", rows[-1][1])
    distances = [(minutes, 10 / minutes) for minutes, _ in rows]
    same_hour.plot({"programs": {name: distances}, "held out": 1.0}, tmp_path)
    assert Image.open(tmp_path / "same_hour.png").width >= 1000


def test_a_program_that_fails_costs_only_itself_and_is_trained_again(
    pictures, tmp_path, monkeypatch, capsys
):
    trained = []

    def noise(name, data, photos, steps, after_step):
        trained.append(name)
        rng = np.random.default_rng(0)
        for step in range(1, steps + 1):
            after_step(step, lambda n: rng.integers(0, 256, (n, 32, 32, 3), np.uint8))

    def broken(data, photos, steps, after_step):
        trained.append("broken")
        raise RuntimeError("no memory")

    programs = {"broken": broken, "b": partial(noise, "b"), "a": partial(noise, "a")}
    monkeypatch.setattr(same_hour, "PROGRAMS", programs)
    monkeypatch.setattr(same_hour, "SAMPLES", 4)
    # Each step takes a second. Everything happens in this process.
    monkeypatch.setattr(same_hour, "seconds_of_step", lambda *_: 1.0)
    monkeypatch.setattr(same_hour, "in_process", lambda work, *arguments: work(*arguments))
    for _ in range(2):
        call(same_hour.main, pictures, "--minutes", 1, "--at-once", 2, "--out", tmp_path)
        assert "broken failed: RuntimeError('no memory')" in capsys.readouterr().err

    assert sorted(trained) == ["a", "b", "broken", "broken"]
    results = json.loads((tmp_path / "distances.json").read_text())
    assert [len(rows) for rows in results["programs"].values()] == [4, 4]
    # Noise is farther from the training images than held-out ones are.
    distances = [distance for rows in results["programs"].values() for _, distance in rows]
    assert min(distances) > results["held out"]


def test_cpu_time_counts_child_processes_dead_or_alive():
    busy = "import time\nwhile time.process_time() < 0.5: pass\n"
    before = same_hour.cpu_seconds()
    subprocess.run([sys.executable, "-c", busy], check=True)
    dead = same_hour.cpu_seconds() - before
    with subprocess.Popen([sys.executable, "-c", f"{busy}time.sleep(60)"]) as child:
        while same_hour.cpu_seconds() - before < dead + 0.4:
            time.sleep(0.05)
        child.kill()
    assert 0.4 < dead < 3


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there it compiles for minutes")
def test_it_finds_all_facts_and_goes_on_after_a_failure(tmp_path, monkeypatch, capsys):
    def broken():
        yield "before the error", 1.0
        raise RuntimeError("no compiler\nfound")

    monkeypatch.chdir(tmp_path)
    # Each time is that of one call.
    monkeypatch.setattr(compare, "TURN_SECONDS", 0)
    monkeypatch.setattr(first_day, "PARTS", {"broken": broken, **first_day.PARTS})

    call(first_day.main)

    facts = json.loads((tmp_path / "first_day.json").read_text())
    printed = capsys.readouterr().out.splitlines()
    assert all(f"{name}: {value}" in printed for name, value in facts.items())
    assert facts.pop("GPU") == "none"
    assert torch.__version__ in facts.pop("PyTorch")
    assert facts.pop("broken") == r"failed: RuntimeError('no compiler\nfound')"
    last = [*facts][-1]
    assert last == "ffhq-day on a CPU, with a tiny network"
    assert re.fullmatch(r"\d[\d.e+]* hours, 0.0 GB", facts.pop(last))
    for script in ("train.py", "sample.py"):
        assert facts.pop(f"ffhq-day, exit status of {script}") == 0
    expected = {"before the error", "faces: steps/s"}
    for precision in ("bfloat16", "float32"):
        expected.add(f"ffhq-v, {precision}: images/s in 1,000 steps")
    for name in ("ffhq-day", "ffhq-v"):
        # Here the compiler only traces, so the gradients are the same.
        assert facts.pop(f"{name}: a parameter's gradients differ by") == 0
        for mode in ("eager", "compiled"):
            assert facts.pop(f"{name}, {mode}: GB") == 0
            expected |= {f"{name}, {mode}: s of the first pass", f"{name}, {mode}: ms per pass"}
    assert facts.keys() == expected
    assert min(facts.values()) > 0
