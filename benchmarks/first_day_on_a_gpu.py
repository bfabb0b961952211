"""Measure on a GPU what docs/speed.md estimates.

    python benchmarks/first_day_on_a_gpu.py

It prints facts as it finds them, and writes them to first_day.json. Without a GPU it runs on the
CPU with a tiny network, as a test of this script.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

# Python looks for modules in this script's folder, not in the repository's root.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from benchmarks.compare import seconds_of, wait_for
from config import EXPERIMENTS
from functions.denoiser import Denoiser
from functions.losses import denoising_loss
from functions.training.metrics import read_metrics
from functions.training.opening import make_run
from functions.training.run import TrainingRun

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
# Without a GPU every network is this one.
TINY = {
    "image_size": 8,
    "lowest_resolution_size": 8,
    "dim_multiply": (1,),
    "transformer_layers": (),
    "base_dim": 8,
    "norm_groups": 2,
}
# A fact that a part has found: its name and its value.
Fact = tuple[str, str | float]


def run_of(name: str, folder: str = "", **changes: str | int) -> TrainingRun:
    """Return a new run of an experiment, with the embedded images and some changed fields."""
    experiment = EXPERIMENTS[name].override(dataset_name="emoji_people", **changes)
    if not GPU:
        experiment = experiment.override(**TINY)
    return make_run(name, experiment, Path(folder), DEVICE)


def denoising_gradient(denoiser: Denoiser, *batch: Tensor) -> None:
    """Run forward and backward of `denoising_loss`."""
    denoising_loss(denoiser, *batch)["loss"].sum().backward()


def training(name: str) -> Iterator[Fact]:
    """Yield time and memory of a pass, forward and backward, eager and compiled.

    The memory is all that is allocated at the peak, with the optimiser and the averages.
    """
    run = run_of(name, precision="bfloat16")
    shape = (run.config.batch_size, *run.experiment.model.image_shape)
    parameters = list(run.model.parameters())
    for parameter in parameters:
        # Before layers that start at zero, the gradients would be zero, too.
        parameter.data.add_(0.02 * torch.randn_like(parameter))

    x_0, noise = torch.randn(2, *shape, device=DEVICE)
    t = torch.zeros(len(x_0), dtype=torch.int64, device=DEVICE)
    gradients = []
    # On a CPU the compiler would take a minute, so there the network is only traced.
    compiled = torch.compile(run.model, dynamic=False, backend="inductor" if GPU else "eager")
    for mode, network in {"eager": run.model, "compiled": compiled}.items():
        denoiser = replace(run.denoiser, network=network)
        one_pass = partial(denoising_gradient, denoiser, x_0, t, noise)
        run.optimizer.zero_grad()
        # Both networks have the same dropout.
        torch.manual_seed(0)
        start = time.perf_counter()
        one_pass()
        wait_for(DEVICE)
        yield f"{name}, {mode}: s of the first pass", time.perf_counter() - start
        # Copies on the CPU take no memory of the GPU.
        gradients.append([parameter.grad.cpu().clone() for parameter in parameters])

        if GPU:
            torch.cuda.reset_peak_memory_stats()
        yield f"{name}, {mode}: ms per pass", 1000 * seconds_of(one_pass, DEVICE)
        yield f"{name}, {mode}: GB", torch.cuda.max_memory_allocated() / 1e9

    # A gradient that is zero but for rounding, such as that of a key's bias, would differ by 100%,
    # so a little of the whole gradient is added to each.
    norms = torch.stack(torch._foreach_norm(gradients[0]))
    differences = torch.stack(torch._foreach_norm(torch._foreach_sub(*gradients)))
    differences /= norms + 3e-5 * norms.norm()
    yield f"{name}: a parameter's gradients differ by", differences.max().item()


@torch.no_grad()
def sampling(name: str) -> Iterator[Fact]:
    """Yield the speed of sampling, in which each step calls the network for 64 images."""
    for precision in ("bfloat16", "float32"):
        run = run_of(name, precision=precision)
        x_t = torch.randn(64, *run.experiment.model.image_shape, device=DEVICE)
        call = partial(run.denoiser, x_t, torch.arange(64, device=DEVICE))
        # The first call warms up.
        call()
        yield f"{name}, {precision}: images/s in 1,000 steps", 0.064 / seconds_of(call, DEVICE)


def steps(name: str) -> Iterator[Fact]:
    """Yield the speed of whole steps in a short run."""
    with tempfile.TemporaryDirectory() as folder:
        speed = images_per_second(name, folder, 1)
    yield f"{name}: steps/s", speed / EXPERIMENTS[name].diffusion.effective_batch


def day() -> Iterator[Fact]:
    """Yield the hours and the memory of `ffhq-day`, by a short run, which is resumed and sampled.

    The memory is the peak, without the 3.4 GB of FFHQ.
    """
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        # Five epochs of the embedded images are 30 steps.
        speed = images_per_second("ffhq-day", folder, 5)
        # The memory of this run is for the next ones.
        torch.cuda.empty_cache()
        (run,) = Path(folder).iterdir()
        resume = ("train.py", "--resume", run, "--diffusion.epochs", "6")
        for command in (resume, ("sample.py", run, "--steps", "20")):
            # The first path is the repository's root.
            status = subprocess.call([sys.executable, *command], cwd=sys.path[0])
            yield f"ffhq-day, exit status of {command[0]}", status

    # FFHQ has 63,000 training images.
    hours = EXPERIMENTS["ffhq-day"].diffusion.epochs * 63_000 / speed / 3600
    name = torch.cuda.get_device_name() if GPU else "a CPU, with a tiny network"
    peak = torch.cuda.max_memory_allocated()
    yield f"ffhq-day on {name}", f"{hours:.3g} hours, {peak / 1e9:.1f} GB"


def images_per_second(name: str, folder: str, epochs: int) -> float:
    """Return the speed of the last ten steps of a short run, as train.py measures it."""
    run = run_of(name, folder, log_every=10, epochs=epochs)
    if not train.train(run):
        raise KeyboardInterrupt
    # The steps before those of the last row warm up.
    return read_metrics(run.folder / "metrics.csv")[-1]["images_per_second"]


PARTS = {
    "training at base 64": partial(training, "ffhq-day"),
    "training at base 128": partial(training, "ffhq-v"),
    "sampling": partial(sampling, "ffhq-v"),
    "steps": partial(steps, "faces"),
    "the day": day,
}


def found() -> Iterator[Fact]:
    """Yield the facts of all parts, and the error of each part that fails."""
    yield "GPU", str(torch.cuda.get_device_properties(DEVICE)) if GPU else "none"
    versions = f"{torch.__version__}, CUDA {torch.version.cuda}"
    yield "PyTorch", f"{versions}, TF32 {torch.backends.cudnn.allow_tf32}"
    for part, measure in PARTS.items():
        try:
            yield from measure()
        except Exception as error:
            # Compilers raise errors of any kind, and the other parts do not depend on this one.
            yield part, f"failed: {error!r:.200}"


def main() -> None:
    """Print and write each fact as soon as it is found."""
    facts = {}
    for name, value in found():
        facts[name] = value
        print(f"{name}: {value}", flush=True)
        Path("first_day.json").write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
