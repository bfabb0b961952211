"""benchmarks/: arms that learn, that take turns and that fail, and the feeding of data."""

import multiprocessing
import re
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from benchmarks import compare, data_feeding
from benchmarks.compare import FFHQ, Arm, ArmFailed, Bench, all_arms, process_of
from tests.conftest import CPU, SMALL_MODEL, call
from tests.forked import SERVER

ARMS = all_arms("float32", CPU)
PACKAGES = ("ours", "diffusers", "lucidrains")
SMALL = replace(FFHQ, **SMALL_MODEL)


# This is slow, as it imports the peers.
@pytest.mark.slow
def test_every_arm_learns_and_ours_and_diffusers_are_of_one_size(monkeypatch):
    facts = {}
    compiled = []

    def pretended_compile(module, dynamic):
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

    # Our network is compiled on CUDA only, where training and sampling have the same layout.
    on_cuda = all_arms("bfloat16", torch.device("cuda"))
    assert on_cuda.keys() ^ ARMS.keys() == {"ours-compiled", *(f"{p}-sampling" for p in PACKAGES)}

    sizes = {facts[name]["parameters"] for name in facts if not name.startswith("lucidrains")}
    assert len(sizes) == 1
    # Kept bytes are not counted in the two arms that compile.
    assert len(compiled) == 2
    assert [fact["kept"] for fact in facts.values()].count(None) == 2
    # It is the same network, so both keep nearly the same.
    assert facts["ours"]["kept"] == pytest.approx(facts["diffusers"]["kept"], rel=0.01)


def test_arms_take_turns_and_one_that_fails_is_a_row(monkeypatch, capsys):
    arms = {
        text: Arm(text, "ours", "float32", torch.channels_last)
        for text in ("ours", "peer", "broken")
    }
    # These are the seconds of each arm's turns, in order.
    seconds = {"ours": iter([9, 1, 1, 9, 1, 10, 9]), "peer": iter([9, 2, 5])}
    asked = []

    @contextmanager
    def process(arm, *_):
        def ask(method):
            asked.append((arm.text, method))
            if arm.text == "broken" or len(asked) > 12:
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
    monkeypatch.setattr(compare, "all_arms", lambda *_: arms)

    flags = "--device cpu --image-size 32 --base-dim 8 --rounds 2"
    call(compare.main, *flags.split())

    printed = capsys.readouterr().out
    setting = r"; PyTorch 2.*, diffusers 0.*, batch 4, 32 px, base_dim 8; 2 rounds\n\n\| arm "
    assert re.search(setting, printed)
    assert asked[4:] == [
        ("peer", "facts"),
        *[("peer", "turn"), ("ours", "turn")] * 3,
        ("broken", "facts"),
    ]
    # The turns of 9 s only warm up. The ratios are of 2 s to 1 s, and of 5 s to 10 s on a machine
    # that has become slower.
    ratios = "1.25 (0.50 to 2.00)"
    cells = ["peer", "5.0 M", "3.5", ratios, "7", ratios, "1.14", "1.0", "1.00"]
    assert f"\n| {' | '.join(cells)} |\n| broken | failed: no / network |" in printed

    # From the 13th question on our own arm fails, which ends the comparison.
    with pytest.raises(ArmFailed, match=r"ours: no \| network"):
        list(compare.rows([arms["ours"], arms["peer"]], 2, SMALL, 4, CPU))


@pytest.mark.parametrize(
    "longest, reason", [(900, "the process ended with -9"), (0, "no answer in 0 s")]
)
def test_a_process_that_dies_or_hangs_is_a_failure(longest, reason, monkeypatch):
    monkeypatch.setattr(compare, "LONGEST_ANSWER", longest)
    # Forks have PyTorch already.
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: SERVER)
    others = set(multiprocessing.active_children())

    with process_of(ARMS["ours"], SMALL, 2, CPU) as ask:
        (process,) = set(multiprocessing.active_children()) - others
        if longest:
            assert ask("facts")["kept"] > 0
            process.kill()
        with pytest.raises(ArmFailed, match=f"^ours: {reason}"):
            ask("facts")
        process.kill()


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
