"""benchmarks/compare.py: the whole on a tiny network, its targets, and arms that fail."""

import json
import statistics
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import compare
from benchmarks.compare_arms import TINY, Shape, all_arms
from benchmarks.compare_rounds import Result, Rounds, ratio
from benchmarks.compare_table import markdown, spread, terminal
from benchmarks.compare_targets import Judge, Target
from benchmarks.compare_worker import Worker, WorkerError
from tests.conftest import TINY as TINY_FLAGS
from tests.conftest import script

CPU = torch.device("cpu")
OURS = all_arms("float32", "cpu")[0]
QUICK_ARMS = ["ours", "ours-none", "ours-blocks", "diffusers-default", "diffusers-channels_last", "lucidrains-default"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The whole benchmark on a tiny network: what it printed, its JSON and its Markdown."""
    folder = tmp_path_factory.mktemp("compare")
    done = script("benchmarks/compare.py", "--quick", "--json", folder / "c.json", "--markdown", folder / "c.md",
                  "--dtype", "float32", "--rounds", 2)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "c.json").read_text()), (folder / "c.md").read_text()


def test_every_arm_is_measured_and_every_number_follows_from_the_readings(quick):
    printed, report, text = quick
    arms = {arm["name"]: arm for arm in report["arms"]}
    assert list(arms) == QUICK_ARMS
    ours = [reading["step"] for reading in arms["ours"]["readings"]]
    for arm in arms.values():
        assert arm["failure"] is None
        assert len(arm["readings"]) == 2
        steps = [reading["step"] for reading in arm["readings"]]
        median = statistics.median(steps)
        assert arm["median"]["step"] == median
        assert arm["step_range"] == [min(steps), max(steps)]
        assert arm["ratio_to_ours"]["step"] == pytest.approx(median / statistics.median(ours))
        assert arm["images_per_second"] == pytest.approx(TINY.batch_size / median)
        rate = arm["flops_per_image"] * TINY.batch_size / median
        assert arm["share_of_ceiling"]["matmul"] == pytest.approx(rate / report["ceilings"]["float32"]["matmul"])
        assert all(r["step"] == pytest.approx(r["pass"] + r["optimizer"]) for r in arm["readings"])
        assert arm["text"] in text
        assert arm["text"] in printed
    assert arms["ours"]["parameters"] == arms["diffusers-default"]["parameters"]
    kept = [arms[name]["kept_bytes_per_image"] for name in ("ours-blocks", "ours", "ours-none")]
    assert kept == sorted(kept)


def test_every_target_has_a_value_and_a_verdict(quick):
    printed, report, text = quick
    arms = {arm["name"]: arm for arm in report["arms"]}
    targets = {target["name"]: target for target in report["targets"]}
    missing = {name for name, target in targets.items() if target["value"] is None}
    assert missing == {
        "step, fastest of ours / diffusers compiled", "kept for backward, counted against memory_allocated",
        "max_memory_reserved, base 128, batch 20, in GB", "max_memory_reserved, base 256, batch 4, in GB",
    }  # fmt: skip
    for name, target in targets.items():
        assert target["verdict"] in ("met", "MISSED", "reported", "not measured")
        assert target["text"], name
        assert f"| {name} |" in text
        assert name in printed
        if name not in missing and target["bound"] != "reported":
            within = target["value"] <= target["limit"] if target["bound"] == "at most" else (
                target["value"] >= target["limit"])  # fmt: skip
            assert target["verdict"] == ("met" if within else "MISSED")
    median = lambda name: arms[name]["median"]["step"]
    values = {name: target["value"] for name, target in targets.items()}
    fastest = min(median(name) for name in QUICK_ARMS[:3])
    assert values["step, fastest of ours / diffusers eager"] == pytest.approx(
        fastest / min(median("diffusers-default"), median("diffusers-channels_last"))
    )
    assert values["step out of the box, ours / lucidrains"] == pytest.approx(median("ours") / median(QUICK_ARMS[-1]))
    replayed = statistics.median(reading["seconds"] for reading in report["replay"])
    assert values["own convolutions and matmuls alone / step"] == pytest.approx(replayed / fastest)


def test_ours_alone_is_measured(quick):
    _, report, text = quick
    assert len(report["alone"]) == 7
    for row in report["alone"]:
        assert row["value"] is not None, row
        assert f"- {row['what']}: " in text
        if row["unit"] == "%":
            assert 0 <= row["value"] < 100


def test_spread_and_verdicts():
    assert spread(1.234, 1.2, 1.3) == "1.23 (1.20 to 1.30)"
    assert spread(0.01234, 0.0119, 0.013) == "0.0123 (0.0119 to 0.013)"
    assert Target("a", "at most", 0.5, 0.5).verdict == Target("a", "at least", 0.5, 0.5).verdict == "met"
    assert Target("a", "at most", 0.5, 0.51).verdict == Target("a", "at least", 0.5, 0.49).verdict == "MISSED"
    assert Target("a", "at most", 0.5, None).verdict == "not measured"
    assert Target("a", "reported", None, 0.3).verdict == "reported"


def reading(number, step):
    return {"round": number, "pass": step, "optimizer": 0.0, "step": step, "call": step}


def test_ratios_are_of_the_rounds_that_both_have():
    ours = Result(OURS, readings=[reading(1, 1.0), reading(2, 1.0), reading(3, 10.0), reading(4, 10.0)])
    peer = Result(OURS, readings=[reading(3, 5.0), reading(4, 5.0)])
    assert ratio(peer, ours) == 0.5  # the machine had become slower when the peer came
    assert ratio(ours, peer) == 2


def test_judge_takes_the_better_of_the_peers_settings():
    arms = {arm.name: arm for arm in all_arms("bfloat16", "cpu")}
    steps = {"ours": 2.0, "ours-none": 1.9, "diffusers-contiguous": 4.0, "diffusers-channels_last-heap": 2.5,
             "diffusers-default": 1.0}  # fmt: skip
    results = {
        name: Result(arms[name], {"kept_bytes_per_image": 100 * step, "flops_per_second": 5.0}, [reading(1, step)])
        for name, step in steps.items()
    }
    results["diffusers-checkpointing"] = Result(arms["diffusers-checkpointing"], failure="it broke")
    replayed = [{"round": 1, "seconds": 1.71}]
    rest = replayed, {"bfloat16": {"matmul": 10.0}}, [], {(128, 20): (11 * 10**9, "")}, "bfloat16"
    on_cpu = {target.name: target for target in Judge(results, *rest, False).targets()}
    with_heap = on_cpu["the same, our setting of the heap given to diffusers"]
    assert with_heap.value == pytest.approx(1.9 / 2.5)
    assert with_heap.text.startswith("ours-none / diffusers-channels_last-heap")
    targets = {target.name: target for target in Judge(results, *rest, True).targets()}
    eager = targets["step, fastest of ours / diffusers eager"]
    assert eager.value == pytest.approx(1.9 / 4)
    assert eager.text.startswith("ours-none / diffusers-contiguous")
    assert (eager.limit, eager.verdict) == (0.65, "met")  # on CUDA
    assert on_cpu["step, fastest of ours / diffusers eager"].limit == 0.93
    assert targets["kept for backward, norms recomputed / diffusers"].value == pytest.approx(200 / 250)
    assert targets["own convolutions and matmuls alone / step"].value == pytest.approx(0.9)
    assert targets["share of the matmul ceiling"].value == 0.5
    assert targets["step, blocks recomputed / nothing recomputed"].verdict == "not measured"
    assert targets["max_memory_reserved, base 128, batch 20, in GB"].verdict == "MISSED"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_arms_have_names_of_their_own(device):
    arms = all_arms("bfloat16", device)
    assert len({arm.name for arm in arms}) == len({arm.text for arm in arms}) == len(arms)
    assert any(arm.keeps_heap for arm in arms) == (device == "cpu")
    assert any(arm.package == "ours" and arm.compiled for arm in arms) == (device == "cuda")


class Broken:
    """A worker whose network cannot be had."""

    def __getattr__(self, method):
        raise WorkerError("no such network")

    def close(self):
        pass


def test_an_arm_that_fails_is_shown_and_ends_nothing(quick):
    peer = replace(OURS, name="peer", text="a peer", package="diffusers")
    dead = replace(OURS, name="dead", text="another peer", package="nobody's")
    open_worker = lambda arm: Broken() if arm is peer else Worker(arm, TINY, "cpu")
    seen = []
    with Rounds(open_worker, 2, 1, 0.0, lambda worker, counts: seen.append(counts)) as rounds:
        rounds.run([OURS, peer, dead])
        assert list(rounds.workers) == ["ours"]
        assert rounds.workers["ours"].training_memory(2) > 10**6  # what CUDA's memory targets ask for
    assert seen == [False, True, True]
    assert len(rounds.results["ours"].readings) == 2
    assert rounds.results["peer"].failure == "no such network"
    assert rounds.results["dead"].failure == """KeyError: "nobody's\""""
    report = json.loads(json.dumps(quick[1]))
    report["arms"].append({"name": "peer", "text": "a peer", "setting": peer.to_dict(), "failure": "no | network"})
    assert "| a peer | - | failed: no / network |" in markdown(report)
    assert "failed: no | network" in terminal(report)


def test_a_process_that_dies_is_a_failure():
    worker = Worker(OURS, TINY, "cpu")
    worker.process.kill()
    with pytest.raises(WorkerError, match="ended with -9"):
        worker.start()
    worker.close()


def test_flags_choose_arms_shape_and_rounds(monkeypatch):
    flags = [
        "--arms",
        "diffusers-default,diffusers-compiled-contiguous",
        "--no-compile",
        "--base-dim",
        "32",
        "--batch-size",
        "3",
        "--warmup",
        "1",
        "--rounds",
        "4",
    ]
    seen = []
    monkeypatch.setattr(sys, "argv", ["compare.py", *flags])
    monkeypatch.setattr(compare, "compare", lambda *args: seen.extend(args))
    monkeypatch.setattr(compare, "terminal", lambda report: "")
    compare.main()
    arms, shape, _, _, options = seen
    assert [arm.name for arm in arms] == ["ours", "diffusers-default"]
    assert shape == replace(Shape(), base_dim=32, batch_size=3)
    assert (options.warmup, options.rounds) == (1, 4)


def test_unknown_arms_are_refused():
    done = script("benchmarks/compare.py", "--arms", "ours,theirs")
    assert done.returncode == 2
    assert "there is no arm theirs" in done.stderr


def test_the_loops_own_share_grows_with_what_is_slow_in_it(pictures, tmp_path):
    """train.py with a data feed that sleeps: nearly all of the time is waiting."""
    code = """
import sys, time, train
from benchmarks import compare_loop
feed = train.ImageFeeder.feed
def slow(self, *args):
    for batch in feed(self, *args):
        time.sleep(0.2)
        yield batch
train.ImageFeeder.feed = slow
compare_loop.main()
"""
    flags = ["--diffusion.dataset-name", pictures, "--runs", tmp_path, *TINY_FLAGS, "--diffusion.epochs", "9",
             "--device=cpu"]  # fmt: skip
    done = script("-c", code, "5", "faces", *flags)
    assert done.returncode == 0, done.stderr
    (share,) = json.loads(done.stdout.splitlines()[-1])
    assert 60 < share < 100
