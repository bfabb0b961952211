"""Our U-Net beside its peers, diffusers' UNet2DModel and lucidrains' Unet: speed, memory, and the targets for both.

    python benchmarks/compare.py [--markdown FILE] [--json FILE] [--rounds 7] [--warmup 2] [--base-dim 64]
        [--batch-size 4] [--dtype auto] [--no-compile] [--arms NAME,NAME,...] [--quick]

Same width, multipliers, image size, batch and precision; each arm, a network in a setting, has a process of its own,
and they take turns, A B C A B C. Each peer runs as it is shipped and in its best settings, compiled ones included
(their first steps take minutes on a CPU). Then ours by itself: data feeding, sampling beside the network, EMA,
checkpoints, the training loop. --quick is a tiny network in a few arms, to see that everything runs.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch

# Run as a script, Python looks for modules in this folder, not in the repository's root.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.compare_arms import TINY, Arm, Shape, all_arms
from benchmarks.compare_rounds import Rounds
from benchmarks.compare_table import markdown, summary, terminal
from benchmarks.compare_targets import MEMORY_TARGETS, Judge
from benchmarks.compare_worker import Worker, WorkerError
from functions.support.command_line import Parser, plain_errors, positive
from functions.support.device import choose_device, choose_precision, cpu_name
from functions.support.errors import UserError

MEMORY_STEPS = 20
QUICK = "ours-none,ours-blocks,diffusers-default,diffusers-channels_last,lucidrains-default"


class MissingPackage(UserError):
    """A peer is not installed."""


class NoSuchArm(UserError):
    """An arm that was asked for by name; the message says which there are."""


def main() -> None:
    """Measure, print, write."""
    options = read_options()
    device = choose_device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = str(choose_precision(options.dtype, device)).removeprefix("torch.")
    machine(device)  # before anything is measured: whether the peers are there
    shape = TINY if options.quick else Shape(base_dim=options.base_dim, batch_size=options.batch_size)
    arms = chosen_arms(all_arms(dtype, device.type), options)
    report = compare(arms, shape, device, dtype, options)
    print(terminal(report))
    if options.markdown:
        options.markdown.write_text(markdown(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))


def read_options() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--rounds", type=positive, default=7, help="that count, default 7")
    parser.add_argument("--warmup", type=positive, default=2, help="rounds before them, default 2")
    parser.add_argument("--base-dim", type=positive, default=64, help="default 64")
    parser.add_argument("--batch-size", type=positive, default=4, help="default 4")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (CUDA)")
    parser.add_argument("--arms", metavar="NAME,...", help="these, and `ours`, that all are compared with")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled arms out")
    parser.add_argument("--quick", action="store_true", help="a tiny network, few rounds; its numbers mean nothing")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.warmup, options.arms = min(options.rounds, 3), 1, options.arms or QUICK
    return options


def chosen_arms(arms: list[Arm], options: argparse.Namespace) -> list[Arm]:
    """Those that the flags leave."""
    if options.arms:
        names = {"ours", *options.arms.split(",")}
        unknown = names - {arm.name for arm in arms}
        if unknown:
            there = ", ".join(arm.name for arm in arms)
            raise NoSuchArm(f"there is no arm {', '.join(sorted(unknown))} on this device; there are {there}")
        arms = [arm for arm in arms if arm.name in names]
    return [arm for arm in arms if not (arm.compiled and options.no_compile)]


def compare(arms: list[Arm], shape: Shape, device: torch.device, dtype: str, options: argparse.Namespace) -> dict:
    """All that is measured, as one dict of plain values."""
    replays, ceilings, alone = [], {}, []

    def after_ours(worker: Worker, counts: bool) -> None:
        seconds, number = worker.replay(), rounds.number
        rates = {kind: worker.ceiling(kind, options.quick) for kind in dict.fromkeys((dtype, "float32"))}
        if counts:
            replays.append({"round": number, "seconds": seconds})
            for kind, of_kind in rates.items():
                for name, rate in of_kind.items():
                    ceilings.setdefault(kind, {}).setdefault(name, []).append(rate)

    open_worker = lambda arm: Worker(arm, shape, str(device))
    turn_seconds = 0.02 if options.quick else 0.3
    with Rounds(open_worker, options.rounds, options.warmup, turn_seconds, after_ours) as rounds:
        rounds.run(arms)
        alone = rounds.attempt(arms[0], lambda worker: worker.alone(min(options.rounds, 5))) or []
    memory = training_memory(shape, device, dtype) if device.type == "cuda" and not options.quick else {}
    return report_of(rounds, replays, ceilings, alone, memory, shape, device, dtype, options)


def training_memory(shape: Shape, device: torch.device, dtype: str) -> dict[tuple[int, int], tuple[int | None, str]]:
    """The peaks of the memory targets: by default, and where that is too much with blocks recomputed."""
    peaks = {}
    modes = [arm for arm in all_arms(dtype, device.type) if arm.name in ("ours", "ours-blocks")]
    for base_dim, batch_size, limit in MEMORY_TARGETS:
        for arm in modes:
            worker = Worker(arm, replace(shape, base_dim=base_dim, batch_size=batch_size), str(device))
            try:
                worker.start()
                peaks[base_dim, batch_size] = worker.training_memory(MEMORY_STEPS), f"{arm.text}; with EMA"
            except WorkerError as error:
                peaks[base_dim, batch_size] = None, f"{arm.text}: {error}"
            finally:
                worker.close()
            if (peaks[base_dim, batch_size][0] or limit) < limit:
                break
    return peaks


def report_of(
    rounds: Rounds,
    replays: list[dict],
    ceilings: dict[str, dict[str, list[float]]],
    alone: list[dict],
    memory: dict[tuple[int, int], tuple[int | None, str]],
    shape: Shape,
    device: torch.device,
    dtype: str,
    options: argparse.Namespace,
) -> dict:
    """What was measured, with all that follows from it."""
    results, reference = rounds.results, rounds.results["ours"]
    medians = {kind: {name: statistics.median(rates) for name, rates in of.items()} for kind, of in ceilings.items()}
    for result in results.values():
        if result.failure is None:
            flops = result.facts["flops_per_image"] * shape.batch_size
            result.facts["flops_per_second"] = flops / result.median("step")
    if reference.failure is None:
        text = f"{reference.median('optimizer') / reference.median('step'):.1%} of a step"
        alone = [{"what": "fused Adam", "value": reference.median("optimizer"), "unit": "s", "text": text}, *alone]
    judge = Judge(results, replays, medians, alone, memory, dtype, device.type == "cuda")
    return {
        "date": f"{datetime.date.today():%Y-%m-%d}",
        "machine": machine(device),
        "settings": {"shape": vars(shape), "dtype": dtype, "rounds": options.rounds, "warmup": options.warmup},
        "arms": [summary(result, reference, shape.batch_size, medians) for result in results.values()],
        "ceilings": medians,
        "replay": replays,
        "targets": [target.to_dict() for target in judge.targets()],
        "alone": alone,
    }


def machine(device: torch.device) -> dict[str, str | int]:
    versions = {}
    for package in ("torch", "diffusers", "denoising-diffusion-pytorch"):
        try:
            versions[package] = importlib.metadata.version(package).partition("+")[0]  # not the build
        except importlib.metadata.PackageNotFoundError as error:
            raise MissingPackage(f"{package} is not installed: pip install -r requirements-dev.txt") from error
    return {
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **versions,
    }


if __name__ == "__main__":
    with plain_errors():
        main()
