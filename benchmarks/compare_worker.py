"""A process for each arm of benchmarks/compare.py, so that heap, caches and peak memory are its own.

`Worker` is the coordinator's end; run as `python -m benchmarks.compare_worker` this module is the other: it reads one
request a line from its standard input, (method of `Bench`, arguments) as JSON, and answers with one line.
"""

import contextlib
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.compare_alone import Alone
from benchmarks.compare_arms import LAYOUTS, Arm, Shape, build, configure
from benchmarks.compare_measures import (
    MEMINFO,
    Ceiling,
    Stopwatch,
    allocated_bytes,
    counted_flops,
    kept_bytes,
    kilobytes,
    noise_loss,
    peak_bytes,
    seconds_of,
    slope,
)
from benchmarks.compare_replay import recorded, replay
from functions.ema import update_ema
from functions.noise_scheduler import NoiseScheduler
from functions.prediction import Denoiser
from functions.support.device import DTYPES, Adam, keep_heap

ROOT = Path(__file__).resolve().parents[1]
FIRST_STEPS = 3  # before the peak is read: Adam has its moments after the first


class WorkerError(RuntimeError):
    """What a worker was asked for did not work; the message is its error's."""


class Worker:
    """An arm's process, as the coordinator sees it: `worker.step()` asks it for `Bench.step()`."""

    def __init__(self, arm: Arm, shape: Shape, device: str):
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process is
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.compare_worker", json.dumps([arm.to_dict(), vars(shape), device])],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            env={**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"},  # so that a cold start is one
        )  # fmt: skip

    def __getattr__(self, method: str) -> Callable[..., object]:
        return lambda *arguments: self._ask(method, arguments)

    def _ask(self, method: str, arguments: tuple) -> object:
        try:
            print(json.dumps([method, arguments]), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self.errors.seek(0)
            lines = self.errors.read().strip().splitlines() or ["it said nothing"]
            raise WorkerError(f"the process ended with {self.process.wait()}: {lines[-1]}")
        result, error = json.loads(answer)
        if error:
            raise WorkerError(error)
        return result

    def close(self) -> None:
        """End the process; its memory is free when this returns."""
        with contextlib.suppress(BrokenPipeError):  # closing flushes what a dead process did not take
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.errors.close()


class Bench:
    """One arm's network, optimiser and fixed inputs; the methods are what a coordinator may ask for."""

    def __init__(self, arm: Arm, shape: Shape, device: torch.device):
        if arm.keeps_heap:
            keep_heap()
        self.arm, self.shape, self.device, self.dtype = arm, shape, device, DTYPES[arm.dtype]
        self.module = build(arm, shape, device)
        self.network = configure(arm, self.module)
        adam = Adam if arm.package == "ours" else torch.optim.Adam
        self.optimizer = adam(self.module.parameters(), lr=1e-5, fused=True)
        self.batch = self.inputs(shape.batch_size)
        self.ceilings: dict[str, Ceiling] = {}
        self.calls = None

    def inputs(self, images: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x_t, t, noise: the same numbers in every arm, x_t in its layout."""
        generator = torch.Generator().manual_seed(0)
        size = (images, 3, self.shape.image_size, self.shape.image_size)
        x_t, noise = (torch.randn(size, generator=generator).to(self.device) for _ in range(2))
        t = torch.randint(1000, (images,), generator=generator).to(self.device)
        return x_t.contiguous(memory_format=LAYOUTS[self.arm.layout]), t, noise

    def start(self) -> dict:
        """The first steps and calls: those that compile, and after which the peak of memory is known."""
        began = time.perf_counter()
        self.steps(1)
        first_step = time.perf_counter() - began
        self.steps(FIRST_STEPS - 1)
        peak = peak_bytes(self.device)
        began = time.perf_counter()
        self.calls_without_gradients(1)
        return {
            "parameters": sum(parameter.numel() for parameter in self.module.parameters()),
            "peak_bytes": peak,
            "first_seconds": first_step + time.perf_counter() - began,
        }

    def steps(self, count: int) -> list[dict[str, float]]:
        """Seconds of a forward and backward pass, of the optimiser, and of the step that they are, for each step."""
        watch = Stopwatch(self.device)
        for _ in range(count):
            noise_loss(self.network, *self.batch, self.dtype).backward()
            watch.mark()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            watch.mark()
        parts = watch.seconds()
        pairs = zip(parts[::2], parts[1::2], strict=True)
        return [{"pass": there, "optimizer": update, "step": there + update} for there, update in pairs]

    def calls_without_gradients(self, count: int) -> float:
        """Seconds of a network call as samplers make it, the mean of several in a row."""
        x_t, t, _ = self.batch
        self.module.eval()
        denoiser = Denoiser(self.network, NoiseScheduler(1000), precision=self.dtype)
        with torch.no_grad():
            seconds = seconds_of(lambda: denoiser(x_t, t), self.device, count)
        self.module.train()
        return seconds

    def turn(self, seconds: float) -> dict[str, float]:
        """A reading of everything timed, in seconds, from as many steps and calls as take about so long.

        One at least and 50 at most; of steps their median.
        """
        fitting = lambda one: max(1, min(50, int(seconds / one)))
        steps = self.steps(1)
        steps += self.steps(fitting(steps[0]["step"]) - 1)
        call = self.calls_without_gradients(1)
        if fitting(call) > 1:
            call = self.calls_without_gradients(fitting(call))
        return {name: statistics.median(step[name] for step in steps) for name in steps[0]} | {"call": call}

    def replay(self) -> float:
        """Seconds of the network's own convolutions and matrix products alone, as many as in a pass."""
        if self.calls is None:
            self.calls = recorded(self.plain_pass)
            self.optimizer.zero_grad(set_to_none=True)
        return replay(self.calls, self.device)

    def ceiling(self, dtype: str, tiny: bool) -> dict[str, float]:
        """FLOPs a second of the best matrix product and the best convolution in a dtype."""
        if dtype not in self.ceilings:
            self.ceilings[dtype] = Ceiling(DTYPES[dtype], self.device, tiny)
        return self.ceilings[dtype].measure()

    def plain_pass(self) -> None:
        """Forward and backward, eager, with nothing computed twice."""
        network = configure(self.arm, self.module, plain=True)
        noise_loss(network, *self.batch, self.dtype).backward()
        self.network = configure(self.arm, self.module)

    def loss_of(self, images: int) -> Callable[[], torch.Tensor]:
        """A forward pass on a batch that is there already."""
        inputs = self.inputs(images)
        return lambda: noise_loss(self.network, *inputs, self.dtype)

    def facts(self) -> dict:
        """What needs no clock: FLOPs of a training pass, and bytes kept for backward, both for one image.

        A compiled network is compiled again for every batch, so its kept bytes are not asked for.
        """
        facts = {"flops_per_image": counted_flops(self.plain_pass) / self.shape.batch_size}
        self.optimizer.zero_grad(set_to_none=True)
        if not self.arm.compiled:
            facts["kept_bytes_per_image"] = slope(lambda n: kept_bytes(self.module, self.loss_of(n)))
            if self.device.type == "cuda":
                facts["allocated_bytes_per_image"] = slope(lambda n: allocated_bytes(self.loss_of(n)))
        return facts

    def free_bytes(self) -> int:
        """Memory that is still free on the device, for other workers too."""
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info()[0]
        return kilobytes(MEMINFO)["MemAvailable"] if MEMINFO.exists() else sys.maxsize

    def training_memory(self, steps: int) -> int:
        """Peak bytes over training steps with an EMA beside the network: reserved on CUDA, the process's on the CPU."""
        ema = copy.deepcopy(self.module).eval().requires_grad_(False)
        for step in range(steps):
            self.steps(1)
            update_ema(ema, self.module, step, 0.9999)
        return torch.cuda.max_memory_reserved() if self.device.type == "cuda" else peak_bytes(self.device)

    def alone(self, rounds: int) -> list[dict]:
        """Our own parts beside the network."""
        return Alone(self.module, self.optimizer, self.shape, self.device, self.dtype, rounds).measure()


def main() -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    arm, shape, device = json.loads(sys.argv[1])
    shape = Shape(**{name: tuple(value) if isinstance(value, list) else value for name, value in shape.items()})
    bench = None
    for line in sys.stdin:
        method, arguments = json.loads(line)
        result, error = None, None
        try:
            bench = bench or Bench(Arm(**arm), shape, torch.device(device))
            result = getattr(bench, method)(*arguments)
        except Exception as problem:  # whatever it is, it is this arm's result
            traceback.print_exc()
            text = str(problem).strip().splitlines() or [""]
            error = f"{type(problem).__name__}: {text[0]}"
        print(json.dumps([result, error]), file=answers, flush=True)


if __name__ == "__main__":
    main()
