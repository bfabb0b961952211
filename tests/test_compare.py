"""benchmarks/: networks that learn beside ours, and the first day on a GPU in small."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import compare, same_hour
from benchmarks import first_day_on_a_gpu as first_day
from benchmarks.compare import COLUMNS
from config import EXPERIMENTS
from tests.conftest import HELD_OUT, SMALL_MODEL, call, refused

SMALL = replace(EXPERIMENTS["ffhq-run2"].model, **SMALL_MODEL)


@pytest.mark.slow
def test_a_row_has_all_columns_or_the_error_of_its_process(monkeypatch):
    """tests/models/test_unet.py compares both networks."""
    monkeypatch.setattr(compare, "TURN_SECONDS", 0)
    cells = compare.measure("diffusers", compare.PLAIN, SMALL, 2, 1, "cpu")
    assert cells[0] == "0.1 M"
    # PyTorch alone takes some 0.2 GB.
    assert float(cells[-1]) > 0.1

    failed = compare.row("ours", compare.PLAIN, SMALL, 2, 1, "nowhere")
    assert len(failed) == len(COLUMNS) == len(cells) + 2
    assert "device is 'nowhere'" in failed[2]


@pytest.mark.slow
def test_our_program_is_timed_trained_and_drawn_beside_one_that_fails(
    pictures, tmp_path, monkeypatch, capsys
):
    """An epoch of the 46 training images has two steps of 16. Drawing takes no time."""
    monkeypatch.setattr(same_hour, "MODEL", SMALL)
    monkeypatch.setattr(same_hour, "SIZE", SMALL.image_size)
    # Only the main thread, that of a process there, may handle signals.
    monkeypatch.setattr(signal, "signal", mock.Mock())
    monkeypatch.setattr(same_hour, "in_process", lambda work, *arguments: work(*arguments))
    clock = [0.0]
    monkeypatch.setattr(same_hour, "cpu_seconds", lambda: clock[0])
    program = same_hour.PROGRAMS["ours, faces-v"]
    trained = []

    def a_minute_a_step(data, photos, steps, seed, after_step):
        def minute_later(step, draw):
            def draw_for_an_hour(n):
                clock[0] += 3600
                return draw(n)

            clock[0] += 60
            after_step(step, draw_for_an_hour)

        trained.append(steps)
        program(data, photos, steps, seed, minute_later)

    def broken(*arguments):
        raise RuntimeError("no memory")

    programs = {"ours, faces-v": a_minute_a_step, "diffusers": broken}
    monkeypatch.setattr(same_hour, "PROGRAMS", programs)
    arguments = (pictures, "--minutes 16 --seed 3 --out", tmp_path)
    with refused("no results of diffusers; the same command trains"):
        call(same_hour, *arguments)
    assert "RuntimeError: no memory" in capsys.readouterr().err
    facts = json.loads((tmp_path / "distances.json").read_text())
    ours = facts["programs"]["ours, faces-v"]
    # The clock starts after the first step.
    assert (ours["steps"], ours["minutes"]) == (16, [1, 3, 7, 15])
    drawn = [np.load(tmp_path / f"ours, faces-v-{part}.npy") for part in range(4)]
    # As many are drawn as pictures are held out.
    assert {samples.shape for samples in drawn} == {(len(HELD_OUT), 16, 16, 3)}
    # Training has gone on between them, from the same noise.
    assert not np.array_equal(drawn[0], drawn[3])

    monkeypatch.delitem(programs, "diffusers")
    call(same_hour, *arguments)
    # It is timed once, and trained once.
    assert trained == [2 * (same_hour.WARM_UP_STEPS + 1), 16]
    assert Image.open(tmp_path / "same_hour.png").width >= 1000


def test_cpu_time_counts_child_processes_dead_or_alive():
    before = same_hour.cpu_seconds()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as child:
        while same_hour.cpu_seconds() - before < 0.5:
            time.sleep(0.05)
        child.kill()
    assert same_hour.cpu_seconds() - before > 0.4


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there it compiles for minutes")
def test_it_finds_all_facts_and_goes_on_after_a_failure(tmp_path, monkeypatch):
    def broken():
        yield "before the error", 1.0
        raise RuntimeError("no compiler\nfound")

    def in_this_process(command, cwd):
        script, *arguments = command[1:]
        call(import_module(script.removesuffix(".py")), *arguments)
        return 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "call", in_this_process)
    # Each time is that of one call.
    monkeypatch.setattr(compare, "TURN_SECONDS", 0)
    # The other parts do the same with other presets.
    parts = {
        name: first_day.PARTS[name] for name in ("training at base 128", "sampling", "the day")
    }
    monkeypatch.setattr(first_day, "PARTS", {"broken": broken, **parts})

    call(first_day)

    facts = json.loads((tmp_path / "first_day.json").read_text())
    assert facts.pop("broken") == r"failed: RuntimeError('no compiler\nfound')"
    assert "failed" not in str(facts)
    for script in ("train.py", "sample.py"):
        assert facts[f"ffhq-day, exit status of {script}"] == 0
    # Here the compiler only traces, so the gradients are the same.
    assert facts["ffhq-v: a parameter's gradients differ by"] == 0
