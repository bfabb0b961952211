"""Compare our U-Net with diffusers' UNet2DModel and lucidrains' Unet in a
Markdown table.

    python benchmarks/compare.py [--help] | tee table.md

Each network runs with our settings, with these and compiled, and as its
package is used without settings. Ours are the precision and the memory layout
of training. Each row is measured in a process of its own, because peak memory
belongs to a process. In this process the row's network takes turns with ours,
A B A B, because the speed of a machine changes. The comparison needs an idle
machine, and the packages that NOTES.md names. It has not been run on a GPU
yet.
"""

import datetime
import importlib.metadata
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from torch import nn

# Python looks for modules in this script's folder, not in the repository's root.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import EXPERIMENTS, ModelConfig
from extras.diffusers_folder import network_fields
from extras.diffusers_network import DiffusersUNet
from functions.denoiser import Denoiser
from functions.losses import denoising_loss
from functions.noise_scheduler import NoiseScheduler
from functions.saved.run_folder import DeviceFlags
from functions.support.command_line import read_flags, run_script
from functions.support.device import (
    choose_device,
    choose_precision,
    cpu_name,
    fast_layout,
    set_deterministic,
)
from models.networks import build_network

PACKAGES = ("ours", "diffusers", "lucidrains")
OUR_SETTINGS = "our settings"
COMPILED = "our settings, compiled"
PLAIN = "float32, contiguous, eager"
SETTINGS = (OUR_SETTINGS, COMPILED, PLAIN)
# In a turn a network makes steps for this many seconds, then calls for as many seconds, and at
# least one of each.
TURN_SECONDS = 0.3

COLUMNS = (
    "network",
    "settings",
    "parameters",
    "step, s",
    "step / ours",
    "call, s",
    "call / ours",
    "peak, GB",
)
NOTES = """\
Times are medians of all rounds. \
Each ratio compares two turns made one right after the other; brackets have the extremes. \
Ours has our settings, not compiled. \
Step: forward, backward and fused Adam. Call: one network call without gradients, as in sampling. \
Peak: peak memory of the process on the CPU, compiler included; of all tensors on CUDA."""


def build(package: str, model: ModelConfig) -> nn.Module:
    """Return a network with random weights, none of which is zero."""
    torch.manual_seed(0)
    if package == "ours":
        module = build_network(model)
    elif package == "diffusers":
        module = DiffusersUNet(build_diffusers(model))
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

    return UNet2DModel(**network_fields(model))


class Bench:
    """A network with its settings, its optimiser and a batch, after its first two steps."""

    def __init__(
        self, package: str, settings: str, model: ModelConfig, batch: int, device: torch.device
    ):
        self.device = device
        layout = torch.contiguous_format
        precision = torch.float32
        if settings != PLAIN:
            layout = fast_layout(device)
            precision = choose_precision("auto", device)

        self.module = build(package, model).to(device, memory_format=layout)
        network = self.module
        if settings == COMPILED:
            network = torch.compile(network, dynamic=False)

        self.denoiser = Denoiser(network, NoiseScheduler(1000), precision=precision)
        self.optimizer = torch.optim.Adam(self.module.parameters(), lr=1e-5, fused=True)

        # Images are contiguous, as in training. Features have the layout of the weights.
        self.x_0, self.noise = torch.randn(2, batch, *model.image_shape, device=device)
        self.t = torch.randint(1000, (batch,), device=device)
        # Adam's moments exist from the second step on.
        self.step()
        self.step()

    def step(self) -> None:
        """Make an optimiser step, as train.py does."""
        denoising_loss(self.denoiser, self.x_0, self.t, self.noise)["loss"].mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def call(self) -> None:
        """Call the network, as samplers do."""
        self.denoiser(self.noise, self.t)

    def turn(self) -> tuple[float, float]:
        """Return the seconds of a step and of a call."""
        self.module.train()
        step = seconds_of(self.step, self.device)
        self.module.eval()
        return step, seconds_of(self.call, self.device)


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


def peak_gigabytes(device: torch.device) -> float:
    """Return the peak memory of this process, or on CUDA of its tensors; NaN if it is unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9

    # Only Linux has this file.
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    kibibytes = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return kibibytes[0] * 1024 / 1e9 if kibibytes else float("nan")


def measure(
    package: str, settings: str, model: ModelConfig, batch: int, rounds: int, device_name: str
) -> list[str]:
    """Measure a network in this process, and return its cells of COLUMNS from the third on."""
    device = choose_device(device_name)
    set_deterministic(False)
    theirs = Bench(package, settings, model, batch, device)
    # The peak is read before there is a second network.
    peak = peak_gigabytes(device)
    ours = Bench("ours", OUR_SETTINGS, model, batch, device)
    # The first round is a warm-up and does not count.
    turns = [(theirs.turn(), ours.turn()) for _ in range(1 + rounds)][1:]

    cells = [f"{sum(parameter.numel() for parameter in theirs.module.parameters()) / 1e6:.1f} M"]
    for k in range(2):
        ratios = [turn[k] / our_turn[k] for turn, our_turn in turns]
        cells.append(f"{median(turn[k] for turn, _ in turns):.3g}")
        cells.append(f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return [*cells, f"{peak:.2f}"]


def row(package: str, settings: str, *arguments) -> list[str]:
    """Measure a network in a new process, and return its row, or the error that it ended with."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            cells = pool.submit(measure, package, settings, *arguments).result()
        except Exception as error:
            # Whatever fails here, the other rows are still of use. A bar would start a new cell.
            reason = f"{type(error).__name__}: {error}".splitlines()[0].replace("|", "/")
            cells = [f"failed: {reason}", *[""] * (len(COLUMNS) - 3)]
    return [package, settings, *cells]


def heading(preset: str, batch: int, rounds: int, device: torch.device) -> str:
    """Return a line with the machine, the versions, the date, and what was measured."""
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    parts = [f"{processor}, {torch.get_num_threads()} threads"]
    for package in ("torch", "diffusers", "denoising-diffusion-pytorch"):
        # The row of a package that is not installed shows the error.
        with suppress(importlib.metadata.PackageNotFoundError):
            parts.append(f"{package} {importlib.metadata.version(package)}")
    precision = str(choose_precision("auto", device)).removeprefix("torch.")
    parts += [f"{preset}, {precision}, batch {batch}", f"{rounds} rounds"]
    return "; ".join([*parts, str(datetime.date.today())])


@dataclass(frozen=True)
class CompareFlags(DeviceFlags):
    """The flags of this script."""

    # The preset whose network is built.
    preset: Literal[*EXPERIMENTS] = "ffhq-run2"
    # The number of images per step or call.
    batch: int = 4
    # Turns for each row.
    rounds: int = 5


def main() -> None:
    """Measure all networks, and print each row as soon as it is measured."""
    flags = read_flags(CompareFlags(), sys.argv[1:], description=__doc__)
    device = choose_device(flags.device)
    print(f"{heading(flags.preset, flags.batch, flags.rounds, device)}\n")
    print(f"| {' | '.join(COLUMNS)} |\n{'| --- ' * len(COLUMNS)}|", flush=True)
    model = EXPERIMENTS[flags.preset].model
    for package, settings in product(PACKAGES, SETTINGS):
        cells = row(package, settings, model, flags.batch, flags.rounds, flags.device)
        print(f"| {' | '.join(cells)} |", flush=True)
    print(f"\n{NOTES}")


if __name__ == "__main__":
    run_script(main)
