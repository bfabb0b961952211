"""Our U-Net beside its peers, diffusers' UNet2DModel and lucidrains' Unet: seconds and memory, as a Markdown table.

    python benchmarks/compare.py [--help]

An arm is a network in a setting. It has a process of its own, because peak memory and the heap's settings belong to a
process, and it takes turns with ours, A B A B. Each peer runs as it is shipped, and as fast as we could make it: with
our precision, our heap, its faster memory layout (of lucidrains' not tried), compiled. Ours is not compiled. The
comparison needs requirements-dev.txt and a machine that does nothing else. It has not yet run on a GPU.
"""

import argparse
import datetime
import importlib.metadata
import math
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

# Run as a script, Python looks for modules in this folder, not in the repository's root.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import EXPERIMENTS, ConfigError, ModelConfig
from functions.losses import denoising_loss
from functions.noise_scheduler import NoiseScheduler
from functions.prediction import Denoiser
from functions.support.command_line import Parser, plain_errors, positive
from functions.support.device import (
    DTYPES,
    Adam,
    choose_device,
    choose_precision,
    cpu_name,
    keep_heap,
)
from functions.support.diffusers_folder import their_network
from functions.support.errors import UserError
from functions.training.compiling import OPTIONS
from models.unet import UNet

FFHQ = EXPERIMENTS["ffhq-run2"].model  # every network has its multipliers and levels of attention
FIRST_STEPS = 2  # before peak memory is read: the second has Adam's moments from its start
TURN_SECONDS = 0.3  # a turn is steps for so long, then calls for so long; one of each at least
LONGEST_ANSWER = 900.0  # seconds that an arm has for its first steps, with compiling, or for a turn

COLUMNS = (
    "arm",
    "parameters",
    "step, s",
    "step / ours",
    "call, s",
    "call / ours",
    "images/s",
    "kept, MiB an image",
    "peak, GB",
)
NOTES = """Medians of all rounds, and in brackets their least and most; a ratio is of two turns side by side. Step: \
forward, backward, fused Adam. Call: without gradients, as samplers make it. Kept: by a forward pass for backward; not \
counted of compiled networks. Peak: of the process on the CPU, its compiler included; on CUDA allocated / reserved."""


class ArmFailed(UserError):
    """An arm has an error, or its process died or gives no answer; the message says which arm and why."""

    def __init__(self, arm: "Arm", reason: str):
        super().__init__(f"{arm.text}: {reason}")
        self.arm, self.reason = arm, reason


@dataclass(frozen=True)
class Arm:
    """A network in a setting."""

    text: str  # for people
    package: str  # "ours", "diffusers" or "lucidrains"
    precision: str  # of autocast; "float32" is none
    channels_last: bool
    # Freed memory stays with the process: functions.support.device.keep_heap
    keeps_heap: bool = False
    # Ours: none, norms, blocks; diffusers: none, or blocks, its gradient checkpointing
    recompute: str = "none"
    compiled: bool = False


def all_arms(precision: str, on_cpu: bool) -> dict[str, Arm]:
    """Every arm by its name for --arms, ours first. The heap plays a part on the CPU alone."""
    heap = ", heap kept" if on_cpu else ""
    # With which diffusers is (on CUDA: should be) the faster
    layout = "contiguous" if on_cpu else "channels_last"
    eager = Arm(f"diffusers, {layout}{heap}", "diffusers", precision, not on_cpu, on_cpu)
    lucidrains = Arm(f"lucidrains, channels_last{heap}", "lucidrains", precision, True, on_cpu)
    arms = {
        "ours": Arm(
            "ours: norms recomputed, the default", "ours", precision, True, on_cpu, "norms"
        ),
        "ours-none": Arm("ours, nothing recomputed", "ours", precision, True, on_cpu),
        "ours-blocks": Arm("ours, blocks recomputed", "ours", precision, True, on_cpu, "blocks"),
        "diffusers-default": Arm(
            "diffusers as shipped: float32, contiguous, eager", "diffusers", "float32", False
        ),
        "diffusers-channels_last": Arm("diffusers, channels_last", "diffusers", precision, True),
        "diffusers-contiguous": Arm("diffusers, contiguous", "diffusers", precision, False),
        "diffusers-heap": eager,
        "diffusers-compiled": replace(eager, text=f"{eager.text}, compiled", compiled=True),
        "diffusers-checkpointing": replace(
            eager, text=f"{eager.text}, gradient checkpointing", recompute="blocks"
        ),
        "lucidrains-default": Arm(
            "lucidrains as shipped: float32, contiguous, eager", "lucidrains", "float32", False
        ),
        "lucidrains-channels_last": lucidrains,
        "lucidrains-compiled": replace(
            lucidrains, text=f"{lucidrains.text}, compiled", compiled=True
        ),
    }
    return arms if on_cpu else {name: arm for name, arm in arms.items() if name != "diffusers-heap"}


def build(arm: Arm, model: ModelConfig) -> nn.Module:
    """The arm's network. None of its weights is zero, as some of ours are at first: work on zeros can be faster."""
    torch.manual_seed(0)
    if arm.package == "ours":
        module = UNet(**vars(model))
        module.set_recompute(arm.recompute)
    elif arm.package == "diffusers":
        module = build_diffusers(model)
        if arm.recompute == "blocks":
            module.enable_gradient_checkpointing()
    else:
        # The same width and multipliers; its blocks and attention are its own defaults, and others
        from denoising_diffusion_pytorch import Unet

        module = Unet(dim=model.base_dim, dim_mults=model.dim_multiply)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return module


def build_diffusers(model: ModelConfig) -> nn.Module:
    """diffusers' U-Net with our architecture: to the parameter, and the same function (tests/models/test_unet.py)."""
    from diffusers import UNet2DModel

    return UNet2DModel.from_config(their_network(vars(model)))


class Bench:
    """An arm's network, optimiser and batch, in the arm's own process."""

    def __init__(self, arm: Arm, model: ModelConfig, batch: int, device: torch.device):
        if arm.keeps_heap:
            keep_heap()
        self.arm, self.image_size, self.device = arm, model.image_size, device
        self.layout = torch.channels_last if arm.channels_last else torch.contiguous_format
        self.module = build(arm, model).to(device, memory_format=self.layout)
        options = OPTIONS if arm.package == "ours" else None
        network = torch.compile(self.module, options=options) if arm.compiled else self.module
        predict = (
            (lambda x_t, t: network(x_t, t, return_dict=False)[0])
            if arm.package == "diffusers"
            else network
        )
        self.denoiser = Denoiser(predict, NoiseScheduler(1000), DTYPES[arm.precision])
        adam = Adam if arm.package == "ours" else torch.optim.Adam
        self.optimizer = adam(self.module.parameters(), lr=1e-5, fused=True)
        self.batch = self.inputs(batch)

    def inputs(self, images: int) -> tuple[Tensor, Tensor, Tensor]:
        """x_0, t and noise: the same numbers in every arm, in its layout."""
        generator = torch.Generator().manual_seed(0)
        x_0, noise = torch.randn(
            2, images, 3, self.image_size, self.image_size, generator=generator
        ).to(self.device)
        t = torch.randint(1000, (images,), generator=generator).to(self.device)
        return (
            x_0.contiguous(memory_format=self.layout),
            t,
            noise.contiguous(memory_format=self.layout),
        )

    def step(self) -> None:
        """An optimiser step, as in train.py."""
        denoising_loss(self.denoiser, self.denoiser.scheduler, *self.batch).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def call(self) -> None:
        """A call of the network, as samplers make it."""
        x_t, t, _ = self.batch
        self.denoiser(x_t, t)

    def turn(self) -> dict[str, float]:
        """Seconds of a step and of a call."""
        step = seconds_of(self.step, self.device)
        self.module.eval()
        call = seconds_of(self.call, self.device)
        self.module.train()
        return {"step": step, "call": call}

    def facts(self) -> dict:
        """What needs no clock. The first steps are taken here: a compiled network is compiled."""
        for _ in range(FIRST_STEPS):
            self.step()
        return {
            "parameters": sum(parameter.numel() for parameter in self.module.parameters()),
            "peaks": peak_bytes(self.device),
            # What an image adds
            "kept": None if self.arm.compiled else (self.kept_bytes(3) - self.kept_bytes(1)) / 2,
        }

    def kept_bytes(self, images: int) -> int:
        """Bytes that autograd keeps of a forward pass for the backward pass, each storage once; weights among them."""
        inputs, storages = self.inputs(images), {}

        def see(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage  # held, or another could come to lie at its address
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
            denoising_loss(self.denoiser, self.denoiser.scheduler, *inputs)
        return sum(storage.nbytes() for storage in storages.values())


def seconds_of(work: Callable[[], None], device: torch.device) -> float:
    """The mean of as many in a row as take TURN_SECONDS; on CUDA they hide what launching each takes."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start, times = time.perf_counter(), 0
    while times == 0 or time.perf_counter() - start < TURN_SECONDS:
        work()
        times += 1
    wait()
    return (time.perf_counter() - start) / times


def peak_bytes(device: torch.device) -> list[int]:
    """The most bytes so far, on CUDA of tensors and of PyTorch's cache; of the process, where the system says it."""
    if device.type == "cuda":
        return [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()]
    status = Path("/proc/self/status")  # Linux
    lines = status.read_text().splitlines() if status.exists() else []
    return [1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]


def serve(connection: Connection, *setting: object) -> None:
    """What an arm's process does: answer each name of a method of `Bench` with its result, or once with an error."""
    warnings.simplefilter("ignore")  # which compilers give, into the table
    try:
        bench = Bench(*setting)
        while True:
            connection.send(getattr(bench, connection.recv())())
    except EOFError:
        pass  # nobody asks any more
    except Exception as error:  # whatever it is, it is this arm's result
        connection.send(f"{type(error).__name__}: {error}".splitlines()[0])


@contextmanager
def process_of(arm: Arm, *setting: object) -> Iterator[Callable[[str], dict]]:
    """Give the arm a process, and a function that asks a method of its `Bench` for its result, or raises ArmFailed."""
    context = multiprocessing.get_context("spawn")
    connection, others_end = context.Pipe()
    process = context.Process(target=serve, args=(others_end, arm, *setting))
    process.start()
    others_end.close()  # now the process alone has it, and when it dies, reading here ends

    def ask(method: str) -> dict:
        try:
            with suppress(OSError):  # it may have died; why, it may have said
                connection.send(method)
            came = connection.poll(LONGEST_ANSWER)
            answer = connection.recv() if came else f"no answer in {LONGEST_ANSWER:g} s"
        except (EOFError, OSError):
            process.join(10)
            answer = f"the process ended with {process.exitcode}"
        if isinstance(answer, str):
            raise ArmFailed(arm, answer)
        return answer

    try:
        yield ask
    finally:
        connection.close()
        process.join(10)
        process.kill()
        process.join()


def rows(
    arms: list[Arm], rounds: int, model: ModelConfig, batch: int, device: torch.device
) -> Iterator[list[str]]:
    """The cells of each arm, as soon as it is measured; the first arm is ours, with which the others take turns."""
    with process_of(arms[0], model, batch, device) as ask_ours:
        facts = ask_ours("facts")
        turns = [ask_ours("turn") for _ in range(1 + rounds)][1:]  # the first warms up
        yield cells(arms[0], facts, turns, turns, batch)
        for arm in arms[1:]:
            try:
                with process_of(arm, model, batch, device) as ask:
                    facts = ask("facts")
                    pairs = [(ask("turn"), ask_ours("turn")) for _ in range(1 + rounds)][1:]
                yield cells(arm, facts, *zip(*pairs, strict=True), batch)
            except ArmFailed as failure:
                if failure.arm is arms[0]:
                    raise
                yield [arm.text, f"failed: {failure.reason}", *[""] * (len(COLUMNS) - 2)]


def cells(arm: Arm, facts: dict, turns: list[dict], ours: list[dict], batch: int) -> list[str]:
    """A row of the table."""
    step, call = (median(turn[name] for turn in turns) for name in ("step", "call"))
    kept = "" if facts["kept"] is None else f"{facts['kept'] / 2**20:.1f}"
    return [
        arm.text,
        f"{facts['parameters'] / 1e6:.1f} M",
        f"{step:.3g}",
        ratio("step", turns, ours),
        f"{call:.3g}",
        ratio("call", turns, ours),
        f"{batch / step:.3g}",
        kept,
        " / ".join(f"{n / 1e9:.2f}" for n in facts["peaks"]),
    ]


def ratio(name: str, turns: list[dict], ours: list[dict]) -> str:
    """The median, least and most of the rounds' ratios."""
    ratios = [turn[name] / other[name] for turn, other in zip(turns, ours, strict=True)]
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def table_line(row: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in row)} |"


def heading(
    options: argparse.Namespace, model: ModelConfig, precision: str, device: torch.device
) -> str:
    """The machine, the versions, the date, and what was measured."""
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    versions = {"PyTorch": torch.__version__}
    for peer in ("diffusers", "denoising-diffusion-pytorch"):
        with suppress(importlib.metadata.PackageNotFoundError):  # then its row says so
            versions[peer] = importlib.metadata.version(peer)
    return (
        f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; "
        f"{', '.join(f'{name} {number}' for name, number in versions.items())}; {datetime.date.today()}; {precision}, "
        f"batch {options.batch}, {model.image_size} px, base_dim {model.base_dim}; {options.rounds} rounds"
    )


def main() -> None:
    """Measure, and print each arm's row at once."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--image-size", type=positive, default=FFHQ.image_size, help="a multiple of 16"
    )
    parser.add_argument("--base-dim", type=positive, default=FFHQ.base_dim, help="width; even")
    parser.add_argument("--batch", type=positive, default=4, help="images in a step and in a call")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--arms", metavar="NAME,...", help="these alone, beside ours")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the table goes too")
    options = parser.parse_args()

    device = choose_device(options.device)
    precision = str(choose_precision("auto", device)).removeprefix("torch.")
    arms = all_arms(precision, device.type == "cpu")
    names = options.arms.split(",") if options.arms else list(arms)
    if unknown := set(names) - set(arms):
        parser.error(
            f"there is no arm {', '.join(sorted(unknown))} on this device; there are {', '.join(arms)}"
        )
    model = replace(
        FFHQ,
        image_size=options.image_size,
        lowest_resolution_size=options.image_size // 16,
        base_dim=options.base_dim,
        norm_groups=math.gcd(32, options.base_dim),
    )

    lines = [
        heading(options, model, precision, device),
        "",
        table_line(COLUMNS),
        table_line(["---"] * len(COLUMNS)),
    ]
    print(*lines, sep="\n", flush=True)
    chosen = [arm for name, arm in arms.items() if name == "ours" or name in names]
    for row in rows(chosen, options.rounds, model, options.batch, device):
        lines.append(table_line(row))
        print(lines[-1], flush=True)
        if options.out:
            options.out.write_text("\n".join([*lines, "", NOTES, ""]))
    print(f"\n{NOTES}")


if __name__ == "__main__":
    with plain_errors(ConfigError):
        main()
