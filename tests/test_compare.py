"""benchmarks/: its measures against other counts, arms that fail, and both scripts as a whole."""

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
from tests.forked import SERVER
from tests.live_bytes import kept_per_image

ARMS = all_arms("float32", on_cpu=True)
SMALL = replace(FFHQ, **SMALL_MODEL)


@pytest.mark.parametrize("name", ["ours", "ours-none"])
def test_kept_bytes_are_those_that_live_after_a_forward_pass(name):
    bench = Bench(all_arms("bfloat16", True)[name], SMALL, 2, CPU)

    kept = (bench.kept_bytes(3) - bench.kept_bytes(1)) / 2

    assert kept == pytest.approx(kept_per_image(bench.module, torch.bfloat16), rel=1e-3)


# This is slow, as it imports the peers.
@pytest.mark.slow
def test_every_arm_learns_and_ours_and_diffusers_are_of_one_size(monkeypatch):
    facts = {}
    compiled = []

    def pretended_compile(module, options):
        compiled.append(module)
        return module

    monkeypatch.setattr(compare, "TURN_SECONDS", 0)
    # Real compilation takes a minute.
    monkeypatch.setattr(torch, "compile", pretended_compile)

    for name, arm in ARMS.items():
        bench = Bench(arm, SMALL, 2, CPU)
        before = [parameter.clone() for parameter in bench.module.parameters()]
        facts[name] = bench.facts()
        assert not any(map(torch.equal, before, bench.module.parameters())), name
        assert set(bench.turn()) == {"step", "call"}

    sizes = {facts[name]["parameters"] for name in facts if not name.startswith("lucidrains")}
    assert len(sizes) == 1
    # Kept bytes are not counted in the two arms that compile.
    assert len(compiled) == 2
    assert [fact["kept"] for fact in facts.values()].count(None) == 2
    assert facts["diffusers-checkpointing"]["kept"] < facts["diffusers-heap"]["kept"]


def test_seconds_are_the_mean_of_as_many_calls_as_take_the_time(monkeypatch):
    monkeypatch.setattr(compare, "TURN_SECONDS", 0.05)
    calls = []

    seconds = compare.seconds_of(lambda: calls.append(time.sleep(0.03)), CPU)

    assert 1 <= len(calls) <= 2
    assert seconds >= max(0.03, 0.05 / len(calls))


def test_arms_take_turns_and_one_that_fails_is_a_row(monkeypatch):
    ours, peer, broken = (Arm(text, "ours", "float32", True) for text in ("ours", "peer", "broken"))
    # These are the seconds of each arm's turns, in order.
    seconds = {"ours": iter([9, 1, 1, 9, 1, 10, 9]), "peer": iter([9, 2, 5])}
    asked = []

    @contextmanager
    def process(arm, *_):
        def ask(method):
            asked.append((arm.text, method))
            if arm is broken or len(asked) > 12:
                raise ArmFailed(arm, "no | network")
            step = 0
            if method == "turn":
                step = next(seconds[arm.text])
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
    # The turns of 9 s only warm up. The ratios are of 2 s to 1 s, and of 5 s to 10 s on a machine
    # that has become slower.
    ratios = "1.25 (0.50 to 2.00)"
    assert table[1] == ["peer", "5.0 M", "3.5", ratios, "7", ratios, "1.14", "1.0", "1.00"]
    assert compare.table_line(table[2]).startswith("| broken | failed: no / network |")

    # From the 13th question on our own arm fails, which ends the comparison.
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
    # Our arm's process imports all it needs, as it always does. Those of the peers are forks, which
    # have PyTorch already.
    contexts = iter([multiprocessing.get_context("spawn"), SERVER, SERVER])
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: next(contexts))
    (tmp_path / "denoising_diffusion_pytorch.py").write_text("raise ImportError('is not here')")
    # The arms' processes take over this path, where the peer's package cannot be imported.
    monkeypatch.syspath_prepend(tmp_path)

    flags = "--device cpu --image-size 32 --base-dim 8 --batch 2 --rounds 1"
    flags += " --arms diffusers-default,lucidrains-default --out"
    call(compare.main, *flags.split(), tmp_path / "table.md")

    printed = capsys.readouterr().out
    assert (tmp_path / "table.md").read_text() == printed
    setting = r"; PyTorch 2.*, diffusers 0.*, batch 2, 32 px, base_dim 8; 1 rounds\n\n\| arm "
    assert re.search(setting, printed)
    ours, diffusers, lucidrains = map(cells_of, printed.split("\n")[4:7])
    assert len(ours) == len(diffusers) == len(lucidrains) == len(compare.COLUMNS)
    assert ours[1] == diffusers[1] == "1.0 M"
    # Column 6 has images a second, and column 2 the seconds of a step of 2 images.
    assert float(diffusers[6]) == pytest.approx(2 / float(diffusers[2]), rel=0.01)
    assert lucidrains[1] == "failed: ImportError: is not here"


def cells_of(row):
    """Return the cells of a line of the table."""
    return [cell.strip() for cell in row.split("|")[1:-1]]


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
