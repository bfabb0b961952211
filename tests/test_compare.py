"""benchmarks/: what is measured, against other counts; arms that fail; and both scripts as a user calls them."""

import multiprocessing
import re
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from benchmarks import compare, data_feeding
from benchmarks.compare import FFHQ, Arm, ArmFailed, Bench, all_arms, process_of
from tests.conftest import CPU, SMALL_MODEL, call
from tests.live_bytes import kept_per_image

ARMS = all_arms("float32", on_cpu=True)
SMALL = replace(FFHQ, **SMALL_MODEL)


@pytest.mark.parametrize("name", ["ours", "ours-none", "ours-blocks"])
def test_kept_bytes_are_those_that_live_after_a_forward_pass(name):
    bench = Bench(all_arms("bfloat16", True)[name], SMALL, 2, CPU)
    kept = (bench.kept_bytes(3) - bench.kept_bytes(1)) / 2
    assert kept == pytest.approx(kept_per_image(bench.module, torch.bfloat16), rel=1e-3)


@pytest.mark.slow  # it imports the peers
def test_every_arm_learns_and_ours_and_diffusers_are_of_one_size(monkeypatch):
    facts, compiled = {}, []
    monkeypatch.setattr(compare, "TURN_SECONDS", 0)
    # Takes a minute
    monkeypatch.setattr(torch, "compile", lambda module, options: compiled.append(module) or module)
    for name, arm in ARMS.items():
        bench = Bench(arm, SMALL, 2, CPU)
        before = [parameter.clone() for parameter in bench.module.parameters()]
        facts[name] = bench.facts()
        assert not any(map(torch.equal, before, bench.module.parameters())), name
        assert set(bench.turn()) == {"step", "call"}
    assert (
        len(
            {
                fact["parameters"]
                for name, fact in facts.items()
                if not name.startswith("lucidrains")
            }
        )
        == 1
    )
    assert len(compiled) == 2
    assert sum(fact["kept"] is None for fact in facts.values()) == 2
    assert facts["diffusers-checkpointing"]["kept"] < facts["diffusers-heap"]["kept"]


def test_seconds_are_the_mean_of_as_many_calls_as_take_the_time(monkeypatch):
    monkeypatch.setattr(compare, "TURN_SECONDS", 0.05)
    calls = []
    seconds = compare.seconds_of(lambda: calls.append(time.sleep(0.03)), CPU)
    assert 1 <= len(calls) <= 2 and seconds >= max(0.03, 0.05 / len(calls))


def test_arms_take_turns_and_one_that_fails_is_a_row(monkeypatch):
    ours, peer, broken = (Arm(text, "ours", "float32", True) for text in ("ours", "peer", "broken"))
    seconds, asked = {"ours": iter([9, 1, 1, 9, 1, 10, 9]), "peer": iter([9, 2, 5])}, []

    @contextmanager
    def process(arm, *_):
        def ask(method):
            asked.append((arm.text, method))
            if arm is broken or len(asked) > 12:
                raise ArmFailed(arm, "no | network")
            step = next(seconds[arm.text]) if method == "turn" else 0
            return {
                "parameters": 5e6,
                "kept": 2**20,
                "peaks": [1e9],
                "step": step,
                "call": 2 * step,
            }

        yield ask

    monkeypatch.setattr(compare, "process_of", process)
    table = list(compare.rows([ours, peer, broken], 2, SMALL, 4, CPU))
    assert asked[4:] == [
        ("peer", "facts"),
        *[("peer", "turn"), ("ours", "turn")] * 3,
        ("broken", "facts"),
    ]
    # Of 2 to 1 and of 5 to 10: the machine had become slower; the 9 warmed up
    ratios = "1.25 (0.50 to 2.00)"
    assert table[1] == ["peer", "5.0 M", "3.5", ratios, "7", ratios, "1.14", "1.0", "1.00"]
    assert compare.table_line(table[2]).startswith("| broken | failed: no / network |")
    with pytest.raises(ArmFailed, match=r"ours: no \| network"):
        list(compare.rows([ours, peer], 2, SMALL, 4, CPU))


@pytest.mark.parametrize(
    "longest, reason", [(900, "the process ended with -9"), (0, "no answer in 0 s")]
)
def test_a_process_that_dies_or_hangs_is_a_failure(longest, reason, monkeypatch):
    monkeypatch.setattr(compare, "LONGEST_ANSWER", longest)
    others = set(multiprocessing.active_children())
    with process_of(ARMS["ours"], SMALL, 2, CPU) as ask:
        (process,) = set(multiprocessing.active_children()) - others
        if longest:
            process.kill()
        with pytest.raises(ArmFailed, match=f"norms recomputed, the default: {reason}"):
            ask("facts")
        process.kill()


@pytest.mark.slow
def test_the_table_of_the_whole_script(tmp_path, monkeypatch, capsys):
    (tmp_path / "denoising_diffusion_pytorch.py").write_text("raise ImportError('is not here')")
    monkeypatch.syspath_prepend(tmp_path)  # which processes take over
    call(
        compare.main,
        "--device",
        "cpu",
        "--image-size",
        32,
        "--base-dim",
        8,
        "--batch",
        2,
        "--rounds",
        1,
        "--arms",
        "diffusers-default,lucidrains-default",
        "--out",
        tmp_path / "table.md",
    )
    printed = capsys.readouterr().out
    assert (tmp_path / "table.md").read_text() == printed
    assert re.search(
        r"; PyTorch 2.*, diffusers 0.*, batch 2, 32 px, base_dim 8; 1 rounds\n\n\| arm ", printed
    )
    ours, diffusers, lucidrains = (
        [cell.strip() for cell in row.split("|")[1:-1]] for row in printed.split("\n")[4:7]
    )
    assert len(ours) == len(diffusers) == len(lucidrains) == len(compare.COLUMNS)
    assert ours[1] == diffusers[1] == "1.0 M"
    # Images a second
    assert float(diffusers[6]) == pytest.approx(2 / float(diffusers[2]), rel=0.01)
    assert lucidrains[1] == "failed: ImportError: is not here"


def test_an_unknown_arm_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        call(compare.main, "--device", "cpu", "--arms", "ours,theirs")
    assert "there is no arm theirs" in capsys.readouterr().err


@pytest.mark.slow
def test_data_feeding(capsys):
    call(data_feeding.main, "--photos", 24, "--batch-size", 8, "--workers", 1, "--rounds", 1)
    printed = capsys.readouterr().out
    assert "24 photos, batches of 8" in printed
    assert len(re.findall(r"[1-9].* images/s", printed)) == 5
