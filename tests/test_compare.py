"""benchmarks/: networks that learn beside ours, and the first day on a GPU in small."""

import json
import multiprocessing
import re
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from benchmarks import compare, same_hour
from benchmarks import first_day_on_a_gpu as first_day
from benchmarks.compare import COLUMNS, PACKAGES, SETTINGS, Bench
from config import EXPERIMENTS
from data.datasets import load_images
from functions.support.errors import UserError
from functions.support.pictures import save_image
from tests.conftest import CPU, HELD_OUT, SMALL_MODEL, TRAINED, call

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
@pytest.mark.parametrize("name", same_hour.PROGRAMS)
def test_a_program_draws_on_the_way(name, pictures, tmp_path, monkeypatch):
    """An epoch of the 46 training images has two steps of 16. Drawing takes no time."""
    # A process has one precision.
    AcceleratorState._reset_state(reset_partial_state=True)
    small = replace(SMALL, base_dim=16)
    monkeypatch.setattr(same_hour, "MODEL", small)
    monkeypatch.setattr(same_hour, "SIZE", small.image_size)
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, image in enumerate(load_images(str(pictures), 16).images[TRAINED]):
        # lucidrains' Trainer wants 100 images.
        for copy in range(1 if "ours" in name else 3):
            save_image(image, photos / f"{i}-{copy}.png")

    clock = [0.0]
    monkeypatch.setattr(same_hour, "cpu_seconds", lambda: clock[0])
    program = same_hour.PROGRAMS[name]

    def a_minute_a_step(data, photos, steps, seed, after_step):
        def minute_later(step, draw):
            clock[0] += 60
            after_step(step, partial(draw_for_an_hour, draw))

        def draw_for_an_hour(draw, n):
            clock[0] += 3600
            return draw(n)

        program(data, photos, steps, seed, minute_later)

    monkeypatch.setitem(same_hour.PROGRAMS, name, a_minute_a_step)
    minutes = same_hour.draw_on_the_way(name, str(pictures), photos, 16, 0, 3)
    # The clock starts after the first step.
    assert minutes == [1, 3, 7, 15]
    drawn = [np.load(tmp_path / f"{name}-{part}.npy") for part in range(4)]
    for samples in drawn:
        assert samples.shape == (3, 16, 16, 3)
        assert np.ptp(samples) > 0
    # Training has gone on between them, from the same noise.
    assert not np.array_equal(drawn[0], drawn[3])

    facts = {"minutes": minutes, "distances": [8, 4, 2, 1]}
    results = {"settings": {"minutes": 15}, "programs": {name: facts}, "held out": 0.5}
    same_hour.plot(results, tmp_path)
    assert Image.open(tmp_path / "same_hour.png").width >= 1000


@pytest.mark.slow
def test_a_program_is_timed_in_a_process_of_its_own(pictures, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, image in enumerate(load_images(str(pictures), 32).images[TRAINED]):
        save_image(image, photos / f"{i}.png")
    arguments = ("ours, faces-v", str(pictures), photos, 0)
    seconds = same_hour.in_process(same_hour.seconds_of_step, *arguments)
    # A step of 16 images takes some tenths of a second.
    assert 0.01 < seconds < 10


def test_a_process_starts_its_own_as_a_script_does():
    ask = "import multiprocessing; print(multiprocessing.get_start_method())"
    answer = subprocess.run([sys.executable, "-c", ask], check=True, capture_output=True, text=True)
    assert same_hour.in_process(multiprocessing.get_start_method) == answer.stdout.strip()


def test_a_program_that_fails_costs_only_itself_and_is_trained_again(
    pictures, tmp_path, monkeypatch, capsys
):
    trained = []

    def noise(name, data, photos, steps, seed, after_step):
        trained.append(name)
        rng = np.random.default_rng(seed)
        for step in range(1, steps + 1):
            after_step(step, lambda n: rng.integers(0, 256, (n, 32, 32, 3), np.uint8))

    def broken(data, photos, steps, seed, after_step):
        trained.append("broken")
        raise RuntimeError("no memory")

    programs = {"ours, a": partial(noise, "a"), "broken": broken, "ours, b": partial(noise, "b")}
    monkeypatch.setattr(same_hour, "PROGRAMS", programs)
    # Each step takes a second. Everything happens in this process.
    monkeypatch.setattr(same_hour, "seconds_of_step", lambda *_: 1.0)
    monkeypatch.setattr(same_hour, "in_process", lambda work, *arguments: work(*arguments))
    arguments = (pictures, "--minutes", 1, "--at-once", 2, "--seed", 3, "--out", tmp_path)
    for _ in range(2):
        with pytest.raises(UserError, match="no results of broken; the same command trains"):
            call(same_hour.main, *arguments)
        assert "RuntimeError: no memory" in capsys.readouterr().err
    assert sorted(trained) == ["a", "b", "broken", "broken"]

    results = json.loads((tmp_path / "distances.json").read_text())
    for facts in results["programs"].values():
        assert facts["steps"] == 60
        assert len(facts["distances"]) == 4
        # As many pictures are held out as samples of noise are drawn.
        assert min(facts["distances"]) > results["held out"]
        assert len(np.load(tmp_path / "ours, a-3.npy")) == len(HELD_OUT)

    with pytest.raises(UserError, match=r"results of .*'minutes': 1\.0.* another --out"):
        call(same_hour.main, pictures, "--minutes", 2, "--seed", 3, "--out", tmp_path)
    monkeypatch.setitem(programs, "broken", partial(noise, "c"))
    monkeypatch.setitem(same_hour.HUES, "broken", "black")
    call(same_hour.main, *arguments)
    assert (tmp_path / "same_hour.png").exists()


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
