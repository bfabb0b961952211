"""What could not be measured here yet, in at most 10 minutes on an H100.

    python benchmarks/first_day_on_a_gpu.py

Each part is a process of its own with a time of its own, so that neither an error nor a slow
compiler spoils the rest. The facts are written to first_day.json. Without a GPU all of it runs
small, on the CPU, as its own test.
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
from torch.nn.parallel import DistributedDataParallel

# Run as a script, Python looks for modules in this folder, not in the repository's root.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from benchmarks.compare import FFHQ, Arm, Bench
from config import EXPERIMENTS
from functions.sampling.generation import CudaGraphed, ImageSampler, generate_batches
from functions.sampling.options import SamplerOptions
from functions.support.checkpoint import check_whole
from functions.support.device import choose_device, choose_precision, set_deterministic
from functions.support.processes import SINGLE_PROCESS, distributed
from functions.support.run_folder import Run, checkpoints_of
from functions.training.compiling import OPTIONS, largest_difference, tried
from functions.training.metrics import read_metrics

GPU = torch.cuda.is_available()
DEVICE = choose_device("cuda") if GPU else torch.device("cpu")
PRECISION = str(choose_precision("auto", DEVICE)).removeprefix("torch.")
# Without a GPU all sizes are as small as they can be.
BATCH, ROUNDS, STEPS, IMAGES, CALLS = (20, 3, 10, 64, 50) if GPU else (2, 2, 1, 2, 3)
SMALL = {
    "image_size": 16,
    "lowest_resolution_size": 8,
    "dim_multiply": (1, 2),
    "transformer_layers": (1,),
    "norm_groups": 2,
    "base_dim": 8,
}
SIZE = {} if GPU else SMALL
# Without a GPU two processes share the CPU.
PROCESSES = torch.cuda.device_count() or 2
TORCHRUN = f"-m torch.distributed.run --standalone --nproc-per-node {PROCESSES}".split()

# An H100 should need at most this, by the bytes that were counted for benchmarks/NOTES.md.
ESTIMATES = {
    "ours, compiled, base 64: ms a step": 25,
    "ours, compiled, base 128: ms a step": 75,
    "graph: ms a call": 45,
    "float32: a loss beside the CPU's": 1e-3,
    "compiled, base 64: gradients differ by": 0.1,
}


def milliseconds(work: Callable[[], object], times: int) -> float:
    """Return the mean milliseconds of so many calls of `work`."""
    if not GPU:
        return 1000 * timeit.timeit(work, number=times) / times

    # The GPU's own clock does not count what the host does before and after.
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    start.record()
    timeit.timeit(work, number=times)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / times


def environment() -> Iterator[tuple[str, object]]:
    """Yield the GPU, its driver and PyTorch, and how fast the GPU copies and multiplies."""
    yield "GPU", torch.cuda.get_device_properties(0) if GPU else "none"
    driver = "none"
    if GPU:
        ask = "nvidia-smi --query-gpu=driver_version --format=csv,noheader"
        driver = subprocess.check_output(ask.split(), text=True).split()
    yield "driver", driver
    gpus = f"{torch.cuda.device_count()} GPUs"
    yield "PyTorch", f"{torch.__version__}, CUDA {torch.version.cuda}, {gpus}"

    # Each number of 4 bytes is read and written.
    n = 8192 if GPU else 256
    source = torch.ones(n, n, device=DEVICE)
    copying = min(milliseconds(source.clone, 10) for _ in range(2))
    yield "copying: TB/s", 8 * n**2 / copying / 1e9

    # Each of the product's numbers takes n multiplications and n additions.
    matrix = torch.ones(n, n, dtype=torch.bfloat16, device=DEVICE)
    multiplying = min(milliseconds(lambda: matrix @ matrix, 10) for _ in range(2))
    yield "bfloat16: TFLOP/s", 2 * n**3 / multiplying / 1e9


def bench_of(arm: Arm, base_dim: int, device: torch.device) -> Bench:
    """Return an arm with ffhq-run2's network in a width."""
    set_deterministic(False)
    model = replace(FFHQ, **{"base_dim": base_dim, **SIZE})
    bench = Bench(arm, model, BATCH, device)
    # In training a network in channels_last gets contiguous images. It would be compiled once more
    # for images in another layout.
    bench.batch = [tensor.contiguous() for tensor in bench.batch]
    return bench


def training(package: str, base_dim: int) -> Iterator[tuple[str, object]]:
    """Yield the milliseconds of a package's steps, eager and compiled by turns.

    GB are what a step needs beside weights and Adam's moments.
    """
    benches, gradients = {}, []
    for how in ("eager", "compiled"):
        name = f"{package}, {how}, base {base_dim}"
        # A run recomputes norms unless it is compiled.
        recompute = "norms" if package == "ours" and how == "eager" else "none"
        # A compiler takes minutes on the CPU, so there nothing is compiled.
        compiled = GPU and how == "compiled"
        arm = Arm(name, package, PRECISION, True, False, recompute, compiled)

        start = time.perf_counter()
        bench = bench_of(arm, base_dim, DEVICE)
        milliseconds(bench.step, 2)
        yield f"{name}: s for the first steps", time.perf_counter() - start

        benches[name] = bench
        if GPU:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            bench.step()
            yield f"{name}: GB", (torch.cuda.max_memory_allocated() - before) / 1e9
        if package == "ours":
            gradients.append(tried(bench.denoiser, {tuple(bench.batch[0].shape)})[1])

    times = {name: [] for name in benches}
    for name in ROUNDS * list(benches):
        times[name].append(milliseconds(benches[name].step, STEPS))
    for name, rounds in times.items():
        yield f"{name}: ms a step", median(rounds)

    if gradients:
        expected, actual = gradients
        difference = largest_difference(actual, expected, bench.module)
        yield f"compiled, base {base_dim}: gradients differ by", difference


def in_ddp() -> Iterator[tuple[str, object]]:
    """Yield the milliseconds of compiled steps at base 128, in all processes of torchrun.

    By default Dynamo cuts the network into a graph for each of DDP's buckets, whose gradients
    travel while backward goes on. Without optimize_ddp it is one graph, and they travel afterwards.
    """
    with distributed() as processes:
        device = choose_device(DEVICE.type, processes.local_rank)
        for cut in (True, False):
            bench = bench_of(Arm("DDP", "ours", PRECISION, True), 128, device)
            network = DistributedDataParallel(bench.module, gradient_as_bucket_view=True)
            # The compiler would take the first network's graphs for the second one, too.
            torch.compiler.reset()
            compiled = torch.compile(network, dynamic=False, options=OPTIONS, disable=not GPU)
            bench.denoiser = replace(bench.denoiser, network=compiled)

            with torch._dynamo.config.patch(optimize_ddp=cut):
                milliseconds(bench.step, 2)
                taken = milliseconds(bench.step, ROUNDS * STEPS)
            # The processes wait for each other in each step, so one speaks for all.
            if processes.is_main:
                yield f"DDP, optimize_ddp = {cut}, base 128: ms a step", taken


def sampling() -> Iterator[tuple[str, object]]:
    """Yield the milliseconds of a network call in sampling, eager and recorded as a CUDA graph."""
    model = replace(FFHQ, **SIZE)
    bench = Bench(Arm("ours", "ours", PRECISION, True), model, 1, DEVICE)
    bench.module.eval().requires_grad_(False)
    shape = (model.channels, model.image_size, model.image_size)
    sampler = ImageSampler(bench.denoiser, SamplerOptions("ddim", CALLS), shape, 0, DEVICE)

    def work() -> None:
        list(generate_batches(sampler, [range(IMAGES)]))

    for how, network in {"eager": bench.module, "graph": CudaGraphed(bench.module)}.items():
        # On CUDA the sampler wraps its network in `CudaGraphed`; here it gets this one instead.
        with patch("functions.sampling.generation.CudaGraphed", return_value=network):
            # The first time a graph is recorded, or cuDNN tries its kernels.
            work()
            yield f"{how}: ms a call", milliseconds(work, 1) / CALLS


def run_of(runs: Path, device: torch.device, **changes: object) -> Run:
    """Train an epoch of `faces`, which is 50 steps, with the CPU's draws, and return the run."""
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
    # A GPU's random numbers are others than the CPU's, and would make another run.
    with patch.object(train, "training_draws", on_the_cpu):
        train.train(run, device, SINGLE_PROCESS)
    return run


def on_the_cpu(*args: object, draw: Callable = train.training_draws) -> object:
    """Return the draws of a step as the CPU makes them, on the device that is the last argument."""
    *settings, device = args
    draws = draw(*settings, "cpu")
    moved = {name: values.to(device) for name, values in vars(draws).items()}
    return replace(draws, **moved)


def float32() -> Iterator[tuple[str, object]]:
    """Yield the largest relative difference between losses on the GPU and on the CPU."""
    losses = []
    for device in (torch.device("cpu"), DEVICE):
        run = run_of(Path(tempfile.mkdtemp()), device, precision="float32")
        rows = read_metrics(run.folder / "metrics.csv")
        losses.append(torch.tensor([row["loss"] for row in rows]))
    expected, actual = losses
    difference = (actual - expected).abs() / expected
    yield "float32: a loss beside the CPU's", difference.max().item()


def resumed() -> Iterator[tuple[str, object]]:
    """Compare a run that goes on from its middle with the whole run, with deterministic kernels."""
    run = run_of(Path(tempfile.mkdtemp()), DEVICE, deterministic=True)

    # Without its last checkpoint the copy stands at step 25 of 50.
    again = Path(shutil.copytree(run.folder, f"{run.folder}-again"))
    checkpoints_of(again)[-1].unlink()
    with patch.object(train, "training_draws", on_the_cpu):
        run = train.open_run(again, None, None, ({}, {}), SINGLE_PROCESS)
        train.train(run, DEVICE, SINGLE_PROCESS)

    a, b = (
        check_whole(checkpoints_of(folder)[-1]).tensors("model.") for folder in (run.folder, again)
    )
    same = all(torch.equal(a[name], b[name]) for name in a)
    assert same, "a resumed run is another than the whole one"
    yield "a resumed run", "bit for bit as the whole one"


def all_gpus() -> Iterator[tuple[str, object]]:
    """Train on all GPUs at once, or in two processes on the CPU."""
    # Each process needs at least one image of a batch.
    batch_size = f"--diffusion.batch-size {max(16, PROCESSES)}"
    flags = f"faces --runs {tempfile.mkdtemp()} --diffusion.epochs 1 {batch_size}"
    model = [f"--model.{name.replace('_', '-')}={value}" for name, value in SIZE.items()]
    command = [sys.executable, *TORCHRUN, train.__file__, *flags.split(), *model]
    subprocess.run(command, timeout=45, check=True)
    yield f"torchrun with {PROCESSES}", "finished"


# A part may take the seconds beside it, all of them together 10 minutes. After DDP comes no other,
# because its processes live on for a while when its time is over.
PARTS = {
    "environment": (environment, 20),
    "training 64": (lambda: training("ours", 64), 95),
    "float32": (float32, 35),
    "training 128": (lambda: training("ours", 128), 95),
    "sampling": (sampling, 30),
    "resumed": (resumed, 35),
    "diffusers 64": (lambda: training("diffusers", 64), 65),
    "diffusers 128": (lambda: training("diffusers", 128), 65),
    "all GPUs": (all_gpus, 50),
    "DDP": (in_ddp, 85),
}


def main() -> None:
    """Run all parts, write and print what they find, and say what fell short."""
    facts = {}
    for part, (_, seconds) in PARTS.items():
        launcher = TORCHRUN if part == "DDP" else []
        command = [sys.executable, *launcher, __file__, part]
        try:
            printed = subprocess.check_output(command, stderr=subprocess.STDOUT, timeout=seconds)
            facts[part] = "done"
        except subprocess.SubprocessError as error:
            late = isinstance(error, subprocess.TimeoutExpired)
            facts[part] = "skipped: time" if late else "failed"
            printed = error.stdout or b""

        # What a part printed before it ended counts, however it ended.
        lines = printed.decode(errors="replace").splitlines()
        facts |= dict(json.loads(line[5:]) for line in lines if line.startswith("FACT "))
        # The file is written after each part, so a machine that goes down leaves what it measured.
        Path("first_day.json").write_text(json.dumps(facts, indent=1))
        # The last lines of a part that failed say why.
        shown = lines[-9:] if facts[part] == "failed" else []
        print(f"{part}: {facts[part]}", *shown, sep="\n", flush=True)

    print("\n| | |\n|---|---|", *(f"| {name} | {fact} |" for name, fact in facts.items()), sep="\n")
    missing = [f"fell short: {part} {facts[part]}" for part in PARTS if facts[part] != "done"]
    print(*missing, sep="\n")
    for name, most in ESTIMATES.items():
        # The estimates are of a GPU.
        if GPU and not facts.get(name, torch.inf) <= most:
            print(f"fell short: {name} {facts.get(name, 'was not measured')}, estimated {most}")


def run_part(part: str) -> None:
    """Print the facts of a part, each as a line of JSON that `main` reads."""
    find, _ = PARTS[part]
    for name, fact in find():
        value = round(fact, 5) if isinstance(fact, float) else str(fact)
        # The line and its end are written at once, so that no other process writes between them.
        print(f"FACT {json.dumps([name, value])}\n", end="", flush=True)


if __name__ == "__main__":
    if sys.argv[1:]:
        run_part(sys.argv[1])
    else:
        main()
