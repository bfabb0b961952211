"""Measure on a GPU what has been measured only on CPUs, in at most 10 minutes on an H100.

    python benchmarks/first_day_on_a_gpu.py

Each part is a process with a time limit, so an error or a slow compiler in one part does not affect
the others. The facts are written to first_day.json. Without a GPU all parts run on the CPU with the
smallest sizes, as a test of this script.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from torch.nn.parallel import DistributedDataParallel

# Python looks for modules in this script's folder, not in the repository's root.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from benchmarks.compare import FFHQ, Arm, Bench
from config import EXPERIMENTS
from functions.sampling.cuda_graph import CudaGraphed
from functions.sampling.generation import ImageSampler, generate_batches
from functions.sampling.options import SamplerOptions
from functions.support.checkpoint import verify_checkpoint
from functions.support.device import choose_device, choose_precision, set_deterministic
from functions.support.processes import SINGLE_PROCESS, distributed
from functions.support.random_numbers import StepDraws, training_draws
from functions.support.run_folder import Run, checkpoints_of
from functions.training.compiling import OPTIONS, largest_difference, time_and_gradients
from functions.training.metrics import read_metrics

GPU = torch.cuda.is_available()
DEVICE = choose_device("cuda") if GPU else torch.device("cpu")
PRECISION = str(choose_precision("auto", DEVICE)).removeprefix("torch.")
# Without a GPU all sizes are the smallest that work.
BATCH, ROUNDS, STEPS, IMAGE_COUNT, CALLS = (20, 3, 10, 64, 50) if GPU else (2, 2, 1, 2, 3)
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

# A fact that a part has found: its name and its value.
Fact = tuple[str, str | float]

# Upper limits for an H100, estimated from the bytes moved (benchmarks/NOTES.md).
ESTIMATES = {
    "ours, compiled, base 64: ms per step": 25,
    "ours, compiled, base 128: ms per step": 75,
    "graph: ms per call": 45,
    "float32: a loss differs from the CPU's by": 1e-3,
    "compiled, base 64: gradients differ by": 0.1,
}


def milliseconds(work: Callable[[], object], calls: int) -> float:
    """Call `work` this many times, and return the mean milliseconds of a call."""
    if not GPU:
        return 1000 * timeit.timeit(work, number=calls) / calls

    # CUDA events measure the GPU's time, and not the host's time before and after.
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    start.record()
    timeit.timeit(work, number=calls)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def environment() -> Iterator[Fact]:
    """Yield the GPU, its driver, PyTorch's version, and the GPU's speed of copying and products."""
    yield "GPU", str(torch.cuda.get_device_properties(0)) if GPU else "none"
    driver = "none"
    if GPU:
        query = "nvidia-smi --query-gpu=driver_version --format=csv,noheader"
        driver = ", ".join(subprocess.check_output(query.split(), text=True).split())
    yield "driver", driver
    gpus = f"{torch.cuda.device_count()} GPUs"
    yield "PyTorch", f"{torch.__version__}, CUDA {torch.version.cuda}, {gpus}"

    # Each element has 4 bytes, and is read and written.
    n = 8192 if GPU else 256
    source = torch.ones(n, n, device=DEVICE)
    copying = min(milliseconds(source.clone, 10) for _ in range(2))
    yield "copying: TB/s", 8 * n**2 / copying / 1e9

    # Each element of the product takes n multiplications and n additions.
    matrix = torch.ones(n, n, dtype=torch.bfloat16, device=DEVICE)
    multiplying = min(milliseconds(lambda: matrix @ matrix, 10) for _ in range(2))
    yield "bfloat16: TFLOP/s", 2 * n**3 / multiplying / 1e9


def bench_of(arm: Arm, base_dim: int, device: torch.device) -> Bench:
    """Return an arm's bench, with ffhq-run2's network of width `base_dim`."""
    set_deterministic(False)
    model = replace(FFHQ, **{"base_dim": base_dim, **SIZE})
    bench = Bench(arm, model, BATCH, device)
    # In training a channels_last network gets contiguous images. Images in another layout would
    # compile the network a second time.
    bench.batch = [tensor.contiguous() for tensor in bench.batch]
    return bench


def training(package: str, base_dim: int) -> Iterator[Fact]:
    """Yield the milliseconds of a package's steps, eager and compiled, which take turns.

    GB is the memory of a step in addition to weights and Adam's moments.
    """
    benches, gradients = {}, []
    for mode in ("eager", "compiled"):
        name = f"{package}, {mode}, base {base_dim}"
        # A training run recomputes norms unless its network is compiled.
        recompute = "norms" if package == "ours" and mode == "eager" else "none"
        # Compiling takes minutes on the CPU, so nothing is compiled there.
        compiled = GPU and mode == "compiled"
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
            gradients.append(time_and_gradients(bench.denoiser, {tuple(bench.batch[0].shape)})[1])

    times = {name: [] for name in benches}
    for name in ROUNDS * list(benches):
        times[name].append(milliseconds(benches[name].step, STEPS))
    for name, rounds in times.items():
        yield f"{name}: ms per step", median(rounds)

    if gradients:
        expected, actual = gradients
        difference = largest_difference(actual, expected, bench.module)
        yield f"compiled, base {base_dim}: gradients differ by", difference


def in_ddp() -> Iterator[Fact]:
    """Yield the milliseconds of compiled steps at base 128 with DDP, from the main process.

    With optimize_ddp, the default, Dynamo compiles a graph for each of DDP's buckets, and gradients
    of a bucket are reduced while backward continues. Without it there is one graph, and all
    gradients are reduced after backward.
    """
    with distributed() as processes:
        device = choose_device(DEVICE.type, processes.local_rank)
        for optimize_ddp in (True, False):
            bench = bench_of(Arm("DDP", "ours", PRECISION, True), 128, device)
            network = DistributedDataParallel(bench.module, gradient_as_bucket_view=True)
            # Without a reset the compiler would use the first network's graphs for the second.
            torch.compiler.reset()
            compiled = torch.compile(network, dynamic=False, options=OPTIONS, disable=not GPU)
            bench.denoiser = replace(bench.denoiser, network=compiled)

            with torch._dynamo.config.patch(optimize_ddp=optimize_ddp):
                milliseconds(bench.step, 2)
                step_time = milliseconds(bench.step, ROUNDS * STEPS)
            # The processes wait for each other in each step, so their times are the same.
            if processes.is_main:
                yield f"DDP, optimize_ddp = {optimize_ddp}, base 128: ms per step", step_time


def sampling() -> Iterator[Fact]:
    """Yield the milliseconds of a network call in sampling, eager and as a CUDA graph."""
    model = replace(FFHQ, **SIZE)
    bench = Bench(Arm("ours", "ours", PRECISION, True), model, 1, DEVICE)
    bench.module.eval().requires_grad_(False)
    shape = (model.channels, model.image_size, model.image_size)
    sampler = ImageSampler(bench.denoiser, SamplerOptions("ddim", CALLS), shape, 0, DEVICE)

    def sample():
        list(generate_batches(sampler, [range(IMAGE_COUNT)]))

    for mode, network in {"eager": bench.module, "graph": CudaGraphed(bench.module)}.items():
        # `generate_batches` wraps the network in `CudaGraphed` on CUDA. The patch decides instead.
        with patch("functions.sampling.generation.CudaGraphed", return_value=network):
            # The first call records the graph, or cuDNN chooses its kernels.
            sample()
            yield f"{mode}: ms per call", milliseconds(sample, 1) / CALLS


def train_epoch(runs: Path, device: torch.device, **changes: str | bool) -> Run:
    """Train an epoch of `faces`, 50 steps, with random numbers of the CPU; return the run."""
    short = {
        "epochs": 1,
        "log_every": 1,
        "validate_every": 99,
        "sample_every": 99,
        "checkpoint_every": 25,
        "validation_samples": 1,
        "grid_images": 1,
        "grid_steps": 1,
    }
    run = Run("faces", EXPERIMENTS["faces"].override({**short, **changes}, SIZE), runs)
    # The GPU's generator gives other random numbers than the CPU's, so losses would differ.
    with patch.object(train, "training_draws", cpu_draws):
        train.train(run, device, SINGLE_PROCESS)
    return run


def cpu_draws(
    seed: int,
    step: int,
    effective_batch: int,
    image_shape: Sequence[int],
    timesteps: int,
    device: torch.device,
) -> StepDraws:
    """Draw like `training_draws` with the CPU's generator, and move the result to the device."""
    draws = training_draws(seed, step, effective_batch, image_shape, timesteps, "cpu")
    moved = {name: values.to(device) for name, values in vars(draws).items()}
    return replace(draws, **moved)


def float32() -> Iterator[Fact]:
    """Yield the largest relative difference between losses on the GPU and on the CPU."""
    losses = []
    for device in (torch.device("cpu"), DEVICE):
        run = train_epoch(Path(tempfile.mkdtemp()), device, precision="float32")
        rows = read_metrics(run.folder / "metrics.csv")
        losses.append(torch.tensor([row["loss"] for row in rows]))
    expected, actual = losses
    difference = (actual - expected).abs() / expected
    yield "float32: a loss differs from the CPU's by", difference.max().item()


def resumed() -> Iterator[Fact]:
    """Compare a run resumed at step 25 of 50 with the whole run, on deterministic kernels."""
    run = train_epoch(Path(tempfile.mkdtemp()), DEVICE, deterministic=True)

    # Without its last checkpoint, of step 50, the copy resumes from that of step 25.
    copy = Path(shutil.copytree(run.folder, f"{run.folder}-again"))
    checkpoints_of(copy)[-1].unlink()
    with patch.object(train, "training_draws", cpu_draws):
        run = train.open_run(copy, None, None, ({}, {}), SINGLE_PROCESS)
        train.train(run, DEVICE, SINGLE_PROCESS)

    a, b = (
        verify_checkpoint(checkpoints_of(folder)[-1]).tensors("model.")
        for folder in (run.folder, copy)
    )
    same = all(torch.equal(a[name], b[name]) for name in a)
    assert same, "the weights of a resumed run differ from those of the whole run"
    yield "a resumed run", "bit for bit equal to the whole one"


def all_gpus() -> Iterator[Fact]:
    """Train on all GPUs together, or in two processes on the CPU."""
    # Each process needs at least one image of a batch.
    batch_size = f"--diffusion.batch-size {max(16, PROCESSES)}"
    flags = f"faces --runs {tempfile.mkdtemp()} --diffusion.epochs 1 {batch_size}"
    model = [f"--model.{name.replace('_', '-')}={value}" for name, value in SIZE.items()]
    command = [sys.executable, *TORCHRUN, train.__file__, *flags.split(), *model]
    subprocess.run(command, timeout=45, check=True)
    yield f"torchrun with {PROCESSES}", "finished"


# The parts and their time limits in seconds, together 10 minutes. DDP is the last part, because its
# processes can outlive its time limit for a while.
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
    """Run all parts, write and print their facts, and list failures and missed estimates."""
    facts = {}
    for part, (_, seconds) in PARTS.items():
        launcher = TORCHRUN if part == "DDP" else []
        command = [sys.executable, *launcher, __file__, part]
        try:
            output = subprocess.check_output(command, stderr=subprocess.STDOUT, timeout=seconds)
            facts[part] = "done"
        except subprocess.SubprocessError as error:
            timed_out = isinstance(error, subprocess.TimeoutExpired)
            facts[part] = "skipped: time" if timed_out else "failed"
            output = error.stdout or b""

        # Facts that a part printed before it failed count, too.
        lines = output.decode(errors="replace").splitlines()
        facts |= dict(json.loads(line[5:]) for line in lines if line.startswith("FACT "))
        # The file is written after each part, so a crash of the machine leaves the earlier facts.
        Path("first_day.json").write_text(json.dumps(facts, indent=1))
        # The last lines of a failed part contain its error.
        error_lines = lines[-9:] if facts[part] == "failed" else []
        print(f"{part}: {facts[part]}", *error_lines, sep="\n", flush=True)

    print("\n| | |\n|---|---|", *(f"| {name} | {fact} |" for name, fact in facts.items()), sep="\n")
    missing = [f"fell short: {part} {facts[part]}" for part in PARTS if facts[part] != "done"]
    print(*missing, sep="\n")
    for name, limit in ESTIMATES.items():
        # The estimates are for a GPU.
        if GPU and not facts.get(name, torch.inf) <= limit:
            print(f"fell short: {name} {facts.get(name, 'was not measured')}, estimated {limit}")


def run_part(part: str) -> None:
    """Run a part, and print each of its facts as a line of JSON, which `main` reads."""
    measure, _ = PARTS[part]
    for name, fact in measure():
        value = round(fact, 5) if isinstance(fact, float) else str(fact)
        # A line and its newline are written in one call, so no other process can write in between.
        print(f"FACT {json.dumps([name, value])}\n", end="", flush=True)


if __name__ == "__main__":
    if sys.argv[1:]:
        run_part(sys.argv[1])
    else:
        main()
