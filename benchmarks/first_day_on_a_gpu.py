"""What could not be measured here yet: `python benchmarks/first_day_on_a_gpu.py`, at most 8 minutes on an H100.

Each part is a process of its own with a time of its own, so that neither an error nor a slow compiler spoils the rest.
The facts are written to first_day.json. Without a GPU all of it runs small, on the CPU, as its own test.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from benchmarks.compare import FFHQ, Arm, Bench
from config import EXPERIMENTS
from functions.sampling.generation import ImageSampler, Replayed, generate_batches
from functions.sampling.options import SamplerOptions
from functions.support.checkpoint import check_whole
from functions.support.device import choose_device, choose_precision, set_deterministic
from functions.support.processes import SINGLE_PROCESS
from functions.support.run_folder import Run, checkpoints_of
from functions.training.compiling import tried
from functions.training.metrics import read_metrics

GPU = torch.cuda.is_available()
DEVICE = choose_device("cuda") if GPU else torch.device("cpu")
PRECISION = str(choose_precision("auto", DEVICE)).removeprefix("torch.")
BATCH, ROUNDS, STEPS, IMAGES, CALLS = (20, 3, 10, 64, 50) if GPU else (2, 2, 1, 2, 3)
SIZE = (
    {}
    if GPU
    else {
        "image_size": 16,
        "lowest_resolution_size": 8,
        "dim_multiply": (1, 2),
        "transformer_layers": (1,),
        "norm_groups": 2,
        "base_dim": 8,
    }
)
ESTIMATES = {  # of an H100, at most: by the bytes that benchmarks/bytes_moved.py counts
    "ours, compiled, base 64: ms a step": 25,
    "ours, compiled, base 128: ms a step": 75,
    "graph: ms a call": 45,
    "float32: a loss beside the CPU's": 1e-3,
    "compiled, base 64: gradients differ by": 0.1,
}


def milliseconds(work: Callable[[], object], times: int) -> float:
    """Of one of so many, by the GPU's own clock; on the CPU by the host's."""
    if not GPU:
        return 1000 * timeit.timeit(work, number=times) / times
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    timeit.timeit(work, number=times)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / times


def environment() -> Iterator[tuple[str, object]]:
    yield "GPU", torch.cuda.get_device_properties(0) if GPU else "none"
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    yield (
        "driver",
        subprocess.run(ask, check=True, capture_output=True, text=True).stdout.split()
        if GPU
        else "none",
    )
    yield (
        "PyTorch",
        f"{torch.__version__}, CUDA {torch.version.cuda}, {torch.cuda.device_count()} GPUs",
    )
    n = 8192 if GPU else 256
    source, matrix = (
        torch.ones(n, n, device=DEVICE),
        torch.ones(n, n, dtype=torch.bfloat16, device=DEVICE),
    )
    yield (
        "copying: TB/s",
        8 * n**2 / min(milliseconds(lambda: source.clone(), 10) for _ in range(2)) / 1e9,
    )
    yield (
        "bfloat16: TFLOP/s",
        2 * n**3 / min(milliseconds(lambda: matrix @ matrix, 10) for _ in range(2)) / 1e9,
    )


def training(base_dim: int) -> Iterator[tuple[str, object]]:
    """Steps of ffhq-run2's network, all by turns; GB are what a step needs beside weights and Adam's moments."""
    set_deterministic(False)
    benches, times, gradients = {}, {}, []
    for package, compiled in (
        ("ours", False),
        ("ours", True),
        ("diffusers", False),
        ("diffusers", True),
    ):
        name = f"{package}, {'compiled' if compiled else 'eager'}, base {base_dim}"
        recompute = "norms" if package == "ours" and not compiled else "none"  # as a run has it
        arm, start = (
            Arm(name, package, PRECISION, True, False, recompute, compiled),
            time.perf_counter(),
        )
        # On the CPU it takes minutes
        compiler = torch.compile if GPU else lambda module, options: module
        with patch.object(torch, "compile", compiler):
            benches[name] = Bench(
                arm, replace(FFHQ, **{"base_dim": base_dim, **SIZE}), BATCH, DEVICE
            )
        milliseconds(benches[name].step, 2)
        yield f"{name}: s for the first steps", time.perf_counter() - start
        if GPU:
            torch.cuda.reset_peak_memory_stats()
            before, _ = torch.cuda.memory_allocated(), benches[name].step()
            yield f"{name}: GB", (torch.cuda.max_memory_allocated() - before) / 1e9
        if package == "ours":
            gradients.append(
                tried(benches[name].denoiser, {tuple(benches[name].batch[0].shape)})[1]
            )
        if compiled:
            for other, bench in ROUNDS * [*benches.items()]:
                times.setdefault(other, []).append(milliseconds(bench.step, STEPS))
            yield from ((f"{other}: ms a step", median(taken)) for other, taken in times.items())
    difference = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    yield f"compiled, base {base_dim}: gradients differ by", difference.item()


def sampling() -> Iterator[tuple[str, object]]:
    model = replace(FFHQ, **SIZE)
    bench = Bench(Arm("ours", "ours", PRECISION, True), model, 1, DEVICE)
    bench.module.eval().requires_grad_(False)
    shape = (model.channels, model.image_size, model.image_size)
    sampler = ImageSampler(bench.denoiser, SamplerOptions("ddim", CALLS), shape, 0, DEVICE)
    for how, network in {"eager": bench.module, "graph": Replayed(bench.module)}.items():
        with patch("functions.sampling.generation.Replayed", lambda _, network=network: network):
            work = lambda: [*generate_batches(sampler, [range(IMAGES)])]
            work()
            yield f"{how}: ms a call", milliseconds(work, 1) / CALLS


def run_of(runs: Path, device: torch.device, **changes: object) -> Run:
    """An epoch of `faces`, 50 steps, on the CPU's draws."""
    often = {
        "epochs": 1,
        "log_every": 1,
        "validate_every": 99,
        "sample_every": 99,
        "checkpoint_every": 25,
        "validation_samples": 1,
        "grid_images": 1,
        "grid_steps": 1,
    }
    run = Run("faces", EXPERIMENTS["faces"].override({**often, **changes}, SIZE), runs)
    with patch.object(train, "training_draws", on_the_cpu):
        train.train(run, device, SINGLE_PROCESS)
    return run


def on_the_cpu(*args: object, draw: Callable = train.training_draws) -> object:
    draws = draw(*args[:-1], "cpu")
    return type(draws)(*(values.to(args[-1]) for values in vars(draws).values()))


def float32() -> Iterator[tuple[str, object]]:
    runs = [
        run_of(Path(tempfile.mkdtemp()), device, precision="float32")
        for device in (torch.device("cpu"), DEVICE)
    ]
    a, b = (
        torch.tensor([row["loss"] for row in read_metrics(run.folder / "metrics.csv")])
        for run in runs
    )
    yield "float32: a loss beside the CPU's", ((b - a).abs() / a).max().item()


def resumed() -> Iterator[tuple[str, object]]:
    """From the middle on, with deterministic kernels, beside the whole run."""
    run = run_of(Path(tempfile.mkdtemp()), DEVICE, deterministic=True)
    again = Path(shutil.copytree(run.folder, f"{run.folder}-again"))
    checkpoints_of(again)[-1].unlink()
    with patch.object(train, "training_draws", on_the_cpu):
        train.train(train.open_run(again, None, ({}, {}), SINGLE_PROCESS), DEVICE, SINGLE_PROCESS)
    a, b = (
        check_whole(checkpoints_of(folder)[-1]).tensors("model.") for folder in (run.folder, again)
    )
    assert all(torch.equal(a[name], b[name]) for name in a), (
        "a resumed run is another than the whole one"
    )
    yield "a resumed run", "bit for bit as the whole one"


def all_gpus() -> Iterator[tuple[str, object]]:
    """Two processes on the CPU."""
    count = torch.cuda.device_count() or 2
    flags = f"faces --runs {tempfile.mkdtemp()} --diffusion.epochs 1 --diffusion.batch-size {max(16, count)}"
    model = [
        f"--model.{name.replace('_', '-')}={value}".replace(" ", "").strip("(,)")
        for name, value in SIZE.items()
    ]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(count),
    ]
    subprocess.run([*torchrun, train.__file__, *flags.split(), *model], timeout=45, check=True)
    yield f"torchrun with {count}", "finished"


PARTS = {  # with the seconds that each may take
    "environment": (environment, 20),
    "training 64": (lambda: training(64), 155),
    "float32": (float32, 35),
    "training 128": (lambda: training(128), 155),
    "sampling": (sampling, 30),
    "resumed": (resumed, 35),
    "all GPUs": (all_gpus, 50),
}


def main() -> None:
    found = {}
    for part, (_, seconds) in PARTS.items():
        command = [sys.executable, __file__, part]
        try:
            run = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                check=True,
            )
            found[part], printed = "done", run.stdout
        except subprocess.SubprocessError as error:
            late = isinstance(error, subprocess.TimeoutExpired)
            found[part], printed = "skipped: time" if late else "failed", error.stdout or b""
        lines = printed.decode(errors="replace").splitlines()
        found |= dict(json.loads(line[5:]) for line in lines if line.startswith("FACT "))
        Path("first_day.json").write_text(json.dumps(found, indent=1))
        print(
            f"{part}: {found[part]}",
            *lines[-9:] if found[part] == "failed" else (),
            sep="\n",
            flush=True,
        )
    print("\n| | |\n|---|---|", *(f"| {what} | {fact} |" for what, fact in found.items()), sep="\n")
    print(
        *(f"fell short: {part} {found[part]}" for part in PARTS if found[part] != "done"), sep="\n"
    )
    for what, most in ESTIMATES.items():
        if GPU and not found.get(what, torch.inf) <= most:
            print(f"fell short: {what} {found.get(what, 'was not measured')}, estimated {most}")


if __name__ == "__main__":
    for what, fact in PARTS[sys.argv[1]][0]() if sys.argv[1:] else ():
        print(
            f"FACT {json.dumps([what, round(fact, 5) if isinstance(fact, float) else str(fact)])}",
            flush=True,
        )
    if not sys.argv[1:]:
        main()
