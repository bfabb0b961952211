"""Compare our U-Net with diffusers' UNet2DModel and lucidrains' Unet in a Markdown table.

    python benchmarks/compare.py [--help] | tee table.md

An arm is a network with its settings. The table has the time and the memory of each arm. Each arm
runs in a process of its own, because peak memory and heap settings belong to a process. The arms
take turns with our arm, A B A B. Each peer runs as shipped, and with our settings: precision, heap,
and memory layout, which on a CPU is one in training and another one in sampling; eager and
compiled. Our network is compiled only on CUDA, as in training. The comparison needs
requirements-dev.txt and an idle machine. It has not been run on a GPU yet.
"""

import argparse
import datetime
import importlib.metadata
import math
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

# Python looks for modules in this script's folder, not in the repository's root.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import EXPERIMENTS, ModelConfig
from functions.denoiser import Denoiser
from functions.losses import denoising_loss
from functions.noise_scheduler import NoiseScheduler
from functions.support.command_line import Parser, exit_on_user_error, positive
from functions.support.device import (
    DTYPES,
    choose_device,
    choose_precision,
    cpu_name,
    fast_layout,
    keep_heap,
)
from functions.support.diffusers_folder import diffusers_network
from functions.support.errors import UserError
from models.unet import UNet

# Every network has the multipliers and the attention levels of this config.
FFHQ = EXPERIMENTS["ffhq-run2"].model
# Peak memory is read after this many steps: Adam's moments exist from the second step on.
FIRST_STEPS = 2
# In a turn an arm makes steps for this many seconds, then network calls for as many seconds, and at
# least one of each.
TURN_SECONDS = 0.3
# The time limit in seconds for an arm's first steps, which compile, and for each turn.
LONGEST_ANSWER = 900.0

COLUMNS = (
    "arm",
    "parameters",
    "step, s",
    "step / ours",
    "call, s",
    "call / ours",
    "images/s",
    "kept, MiB per image",
    "peak, GB",
)
NOTES = """\
Medians of all rounds, with the minimum and the maximum in brackets. \
Each ratio compares two turns made one right after the other. \
Step: forward, backward and fused Adam. Call: one network call without gradients, as in sampling. \
Kept: what a forward pass keeps for backward; not counted for compiled networks. \
Peak: peak memory of the process, compiler included, on the CPU; \
allocated / reserved by PyTorch on CUDA."""


class ArmFailed(UserError):
    """An arm raised an error, or its process died or timed out. The message names the arm."""

    def __init__(self, arm: "Arm", reason: str):
        super().__init__(f"{arm.text}: {reason}")
        self.arm = arm
        self.reason = reason


@dataclass(frozen=True)
class Arm:
    """A network with its settings."""

    text: str  # the name in the table
    package: str  # "ours", "diffusers" or "lucidrains"
    precision: str  # of autocast; "float32" is none
    layout: torch.memory_format
    # Whether freed memory stays with the process (`keep_heap` of functions/support/device.py, which
    # works only on the CPU).
    keeps_heap: bool = False
    compiled: bool = False


def all_arms(precision: str, device: torch.device) -> dict[str, Arm]:
    """Return every arm by its name for --arms, ours first."""
    on_cpu = device.type == "cpu"
    arms = {}
    for package in ("ours", "diffusers", "lucidrains"):
        eager = Arm(package, package, precision, fast_layout(device, training=True), on_cpu)
        arms[package] = eager
        if on_cpu:
            layout = fast_layout(device, training=False)
            text = f"{package}, in our layout of sampling"
            arms[f"{package}-sampling"] = replace(eager, text=text, layout=layout)
        if package != "ours" or not on_cpu:
            text = f"{package}, compiled"
            arms[f"{package}-compiled"] = replace(eager, text=text, compiled=True)
        if package != "ours":
            text = f"{package} as shipped: float32, contiguous, eager"
            arms[f"{package}-default"] = Arm(text, package, "float32", torch.contiguous_format)
    return arms


def build(arm: Arm, model: ModelConfig) -> nn.Module:
    """Return the arm's network, with random weights, none of which is zero."""
    torch.manual_seed(0)
    if arm.package == "ours":
        module = UNet(**vars(model))
    elif arm.package == "diffusers":
        module = build_diffusers(model)
    else:
        # Width and multipliers are ours. Blocks and attention are the package's defaults.
        from denoising_diffusion_pytorch import Unet

        module = Unet(dim=model.base_dim, dim_mults=model.dim_multiply)

    # Some of our layers start at zero, and computing with zeros can be faster.
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return module


def build_diffusers(model: ModelConfig) -> nn.Module:
    """Return diffusers' U-Net with our architecture.

    With the same parameters it computes the same function as ours (tests/models/test_unet.py).
    """
    from diffusers import UNet2DModel

    return UNet2DModel.from_config(diffusers_network(vars(model)))


class Bench:
    """An arm's network, optimiser and batch, in the arm's own process."""

    def __init__(self, arm: Arm, model: ModelConfig, batch: int, device: torch.device):
        if arm.keeps_heap:
            keep_heap()
        self.arm = arm
        self.image_size = model.image_size
        self.device = device
        self.module = build(arm, model).to(device, memory_format=arm.layout)

        network = self.module
        if arm.compiled:
            network = torch.compile(network, dynamic=False)

        def first_of_tuple(x_t, t):
            return network(x_t, t, return_dict=False)[0]

        # diffusers' network returns a tuple, and the others return a tensor.
        predict = first_of_tuple if arm.package == "diffusers" else network
        self.denoiser = Denoiser(predict, NoiseScheduler(1000), precision=DTYPES[arm.precision])

        self.optimizer = torch.optim.Adam(self.module.parameters(), lr=1e-5, fused=True)
        self.batch = self.inputs(batch)

    def inputs(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return x_0, t and noise; all arms have the same values."""
        # The images are contiguous, as in training. Features have the layout of the weights.
        generator = torch.Generator().manual_seed(0)
        shape = (2, batch, 3, self.image_size, self.image_size)
        x_0, noise = torch.randn(shape, generator=generator).to(self.device)
        t = torch.randint(1000, (batch,), generator=generator).to(self.device)
        return x_0, t, noise

    def step(self) -> None:
        """Make an optimiser step, as train.py does."""
        losses = denoising_loss(self.denoiser, *self.batch)
        losses.mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def call(self) -> None:
        """Call the network, as samplers do."""
        x_t, t, _ = self.batch
        self.denoiser(x_t, t)

    def turn(self) -> dict[str, float]:
        """Return the seconds of a step and of a call."""
        step = seconds_of(self.step, self.device)

        # Samplers call the network in eval mode.
        self.module.eval()
        call = seconds_of(self.call, self.device)
        self.module.train()
        return {"step": step, "call": call}

    def facts(self) -> dict:
        """Make the first steps, which compile the network, and return its size and its memory."""
        for _ in range(FIRST_STEPS):
            self.step()

        # The peak is read first, because `kept_bytes` needs memory, too.
        peaks = peak_bytes(self.device)
        kept = None
        if not self.arm.compiled:
            # Autograd keeps the weights for any batch. So the difference is due to two more images.
            kept = (self.kept_bytes(3) - self.kept_bytes(1)) / 2
        parameters = sum(parameter.numel() for parameter in self.module.parameters())
        return {"parameters": parameters, "peaks": peaks, "kept": kept}

    def kept_bytes(self, batch: int) -> int:
        """Return the bytes that autograd keeps of a forward pass for the backward pass.

        Each storage counts once. Weights count too.
        """
        inputs = self.inputs(batch)
        storages = {}

        def record(tensor):
            # The dict keeps the storage alive, so no other storage gets its address.
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            denoising_loss(self.denoiser, *inputs)
        return sum(storage.nbytes() for storage in storages.values())


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Call `work` for TURN_SECONDS, at least once, and return the mean seconds of a call.

    On CUDA the host launches a call while the device computes the one before, as in training.
    """
    wait_for(device)
    start = time.perf_counter()
    calls = 0
    while calls == 0 or time.perf_counter() - start < TURN_SECONDS:
        work()
        calls += 1
    wait_for(device)
    return (time.perf_counter() - start) / calls


def wait_for(device: torch.device) -> None:
    """Wait until the GPU has finished all launched work. A CPU needs no wait."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_bytes(device: torch.device) -> list[int]:
    """Return the process's peak memory in bytes, or an empty list on systems other than Linux.

    On CUDA return two numbers: the peak allocated by tensors, and the peak reserved by PyTorch.
    """
    if device.type == "cuda":
        return [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()]

    # Only Linux has this file.
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return [1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]


def serve(
    connection: Connection, arm: Arm, model: ModelConfig, batch: int, device: torch.device
) -> None:
    """Run an arm's process: receive names of methods of `Bench`, call them and send their results.

    It ends when the other end of the connection is closed. It also ends after an error, whose first
    line it sends.
    """
    # Warnings of compilers would be printed into the table.
    warnings.simplefilter("ignore")
    try:
        bench = Bench(arm, model, batch, device)
        while True:
            method = getattr(bench, connection.recv())
            connection.send(method())
    except EOFError:
        # The other end is closed.
        pass
    except Exception as error:
        # Any error is this arm's result, and the other arms continue.
        connection.send(f"{type(error).__name__}: {error}".splitlines()[0])


@contextmanager
def process_of(
    arm: Arm, model: ModelConfig, batch: int, device: torch.device
) -> Iterator[Callable[[str], dict]]:
    """Start the arm's process, and yield a function that calls methods of its `Bench`.

    The function takes the name of a method and returns its result, or raises ArmFailed.
    """
    context = multiprocessing.get_context("spawn")
    connection, child_connection = context.Pipe()
    process = context.Process(target=serve, args=(child_connection, arm, model, batch, device))
    process.start()
    # Only the arm's process keeps its end open. So if the process dies, reading here ends.
    child_connection.close()

    def ask(method):
        try:
            # Sending to a dead process fails, but its error may still be waiting to be read.
            with suppress(OSError):
                connection.send(method)
            if connection.poll(LONGEST_ANSWER):
                answer = connection.recv()
            else:
                answer = f"no answer in {LONGEST_ANSWER:g} s"
        except (EOFError, OSError):
            process.join(10)
            answer = f"the process ended with {process.exitcode}"
        if isinstance(answer, str):
            raise ArmFailed(arm, answer)
        return answer

    try:
        yield ask
    finally:
        # The process ends when the connection is closed. If it hangs, it is killed.
        connection.close()
        process.join(10)
        process.kill()
        process.join()


def rows(
    arms: list[Arm], rounds: int, model: ModelConfig, batch: int, device: torch.device
) -> Iterator[list[str]]:
    """Yield the table's row for each arm as soon as it is measured.

    The first arm is ours, and the others take turns with it. Raises ArmFailed when ours fails.
    """
    with process_of(arms[0], model, batch, device) as ask_ours:
        facts = ask_ours("facts")
        # The first round is a warm-up and does not count, here and below.
        turns = [ask_ours("turn") for _ in range(1 + rounds)][1:]
        yield cells(arms[0], facts, turns, turns, batch)

        for arm in arms[1:]:
            try:
                with process_of(arm, model, batch, device) as ask:
                    facts = ask("facts")
                    pairs = [(ask("turn"), ask_ours("turn")) for _ in range(1 + rounds)]
                turns, ours = zip(*pairs[1:], strict=True)
                yield cells(arm, facts, turns, ours, batch)
            except ArmFailed as failure:
                # Without our arm there is no comparison.
                if failure.arm is arms[0]:
                    raise
                yield [arm.text, f"failed: {failure.reason}", *[""] * (len(COLUMNS) - 2)]


def cells(arm: Arm, facts: dict, turns: list[dict], ours: list[dict], batch: int) -> list[str]:
    """Return a row of the table, in the order of COLUMNS."""
    step = median(turn["step"] for turn in turns)
    call = median(turn["call"] for turn in turns)
    return [
        arm.text,
        f"{facts['parameters'] / 1e6:.1f} M",
        f"{step:.3g}",
        ratio("step", turns, ours),
        f"{call:.3g}",
        ratio("call", turns, ours),
        f"{batch / step:.3g}",
        "" if facts["kept"] is None else f"{facts['kept'] / 2**20:.1f}",
        " / ".join(f"{peak / 1e9:.2f}" for peak in facts["peaks"]),
    ]


def ratio(name: str, turns: list[dict], ours: list[dict]) -> str:
    """Return the median, the minimum and the maximum of the rounds' ratios, as text."""
    ratios = [turn[name] / other[name] for turn, other in zip(turns, ours, strict=True)]
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def table_line(row: Sequence[str]) -> str:
    """Return a row in Markdown. A bar in a cell would start a new cell, so it becomes a slash."""
    return f"| {' | '.join(cell.replace('|', '/') for cell in row)} |"


def heading(
    options: argparse.Namespace, model: ModelConfig, precision: str, device: torch.device
) -> str:
    """Return a line with the machine, the versions, the date, and what was measured."""
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    versions = [f"PyTorch {torch.__version__}"]
    for peer in ("diffusers", "denoising-diffusion-pytorch"):
        # The row of a peer that is not installed shows the error.
        with suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{peer} {importlib.metadata.version(peer)}")
    return (
        f"{processor}, {torch.get_num_threads()} threads; "
        f"{', '.join(versions)}; {datetime.date.today()}; "
        f"{precision}, batch {options.batch}, {model.image_size} px, base_dim {model.base_dim}; "
        f"{options.rounds} rounds"
    )


def main() -> None:
    """Measure all arms, and print each row as soon as it is measured."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--image-size",
        type=positive,
        default=FFHQ.image_size,
        help="Pixels on a side, a multiple of 16. Default: %(default)s.",
    )
    parser.add_argument(
        "--base-dim",
        type=positive,
        default=FFHQ.base_dim,
        help="The networks' width, an even number. Default: %(default)s.",
    )
    parser.add_argument(
        "--batch",
        type=positive,
        default=4,
        help="The number of images per step or call. Default: %(default)s.",
    )
    parser.add_argument(
        "--rounds", type=positive, default=5, help="Turns for each arm. Default: %(default)s."
    )
    parser.add_argument(
        "--arms", metavar="NAME,...", help="The arms to compare with ours. Default: all."
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="Where to measure. Default: cuda if there is a GPU.",
    )
    options = parser.parse_args()

    device = choose_device(options.device)
    precision = str(choose_precision("auto", device)).removeprefix("torch.")
    arms = all_arms(precision, device)
    # Our arm is first and always measured, since the others take turns with it.
    names = options.arms.split(",") if options.arms else arms
    names = dict.fromkeys(["ours", *names])
    for name in names:
        if name not in arms:
            parser.error(f"there is no arm {name} on this device; choose from {', '.join(arms)}")

    # The lowest of the network's five levels has 1/16 of the image's size.
    model = replace(
        FFHQ,
        image_size=options.image_size,
        lowest_resolution_size=options.image_size // 16,
        base_dim=options.base_dim,
        norm_groups=math.gcd(32, options.base_dim),
    )

    print(f"{heading(options, model, precision, device)}\n\n{table_line(COLUMNS)}")
    print(table_line(["---"] * len(COLUMNS)), flush=True)
    selection = [arms[name] for name in names]
    for row in rows(selection, options.rounds, model, options.batch, device):
        print(table_line(row), flush=True)
    print(f"\n{NOTES}")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
