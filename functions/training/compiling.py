"""On CUDA the network that is trained is compiled, where that saves more time than it takes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from functions.prediction import Denoiser
from functions.support.files import short
from functions.support.processes import Processes
from functions.support.run_folder import Run
from functions.training.start import run_pass

DEVICES = ("cuda",)
# Compiling for one shape takes about so many seconds.
COMPILING = 240
# A compiled pass saves about this part of a pass's time, by the bytes that
# benchmarks/bytes_moved.py counts.
SAVED = 0.5
OPTIONS = {
    # Dropout is drawn as without a compiler.
    "fallback_random": True,
    # What is cheap is computed again and not kept: a pass moves 25 GB, not 30, by the same count.
    "realize_reads_threshold": 32,
    "realize_acc_reads_threshold": 32,
    "realize_opcount_threshold": 200,
}
# The compiled gradient may differ by this part of the plain gradient's norm. PyTorch 2.13 on a CPU
# compiled bfloat16 wrongly: its gradients differed by 0.15 and more.
TOLERANCE = 0.1


def compiled_if_worth_it(
    denoiser: Denoiser, network: nn.Module, run: Run, passes: list[slice], processes: Processes
) -> Denoiser:
    """Return the denoiser to train with, either of `network` or of `network` compiled.

    `network` is the denoiser's as `Processes.wrap` returned it. It is compiled and tried before
    the first step, for all sizes of a step's `passes`.
    """
    eager = replace(denoiser, network=network)
    if not can_be_compiled(run, processes):
        return eager

    # The network is compiled by itself for each shape that a pass has.
    shapes = {(places.stop - places.start, *run.image_shape) for places in passes}
    with trial(network, processes):
        seconds, expected = tried(eager, shapes)
        if not is_worth_it(seconds * len(passes), len(shapes), run, processes):
            return eager

        start = time.monotonic()
        try:
            # The compiled network keeps all that backward needs: a compiler that is to repeat
            # norms repeats convolutions too.
            denoiser.network.set_recompute("none")
            compiled_network = torch.compile(network, dynamic=False, options=OPTIONS)
            compiled = replace(denoiser, network=compiled_network)
            compiled_seconds, gradients = tried(compiled, shapes)
            difference = ((gradients - expected).norm() / expected.norm()).item()
            failure = "" if difference < TOLERANCE else f"its gradients differ by {difference:.0%}"
        except Exception as error:
            # Compilers fail with errors of any kind, and training can go on after all of them.
            failure = f"{type(error).__name__}: {short(error)}"
        took = time.monotonic() - start

    # The processes use the same network, so after a failure in one of them all go on without.
    for reason in processes.gather(failure):
        if reason:
            processes.say(f"             failed, so it goes on without: {reason}")
            denoiser.network.set_recompute(run.experiment.diffusion.recompute)
            return eager
    processes.say(
        f"             took {took:.0f} s; "
        f"a pass takes {compiled_seconds:.3g} s instead of {seconds:.3g}"
    )
    return compiled


def can_be_compiled(run: Run, processes: Processes) -> bool:
    """Return whether device and config allow compiling; print which field does not."""
    if torch.device(run.facts["device"]).type not in DEVICES:
        return False
    for field, value in {"compile": "off", "deterministic": True, "recompute": "blocks"}.items():
        if getattr(run.experiment.diffusion, field) == value:
            processes.say(f"  compiling  is left out, with {field} = {value}")
            return False
    return True


def is_worth_it(step_seconds: float, shapes: int, run: Run, processes: Processes) -> bool:
    """Estimate and print what compiling takes and saves; return whether it saves more.

    `step_seconds` is the time of a step's passes without it, `shapes` the number of their shapes.
    """
    takes = COMPILING * shapes
    steps = run.facts["total_steps"] - run.first_step
    saves = SAVED * step_seconds * steps
    # Each process has timed its own passes, so rank 0 decides for all.
    worth_it = processes.from_main(lambda: saves > takes)
    verb = "takes" if worth_it else "is left out: it would take"
    processes.say(
        f"  compiling  {verb} some {takes} s and save some {saves:,.0f} s of {steps:,} steps; "
        "these are estimates"
    )
    return worth_it


def tried(denoiser: Denoiser, shapes: set[tuple[int, ...]]) -> tuple[float, Tensor]:
    """Return the seconds of a pass in the slowest of these shapes, and the gradients of all."""
    network = denoiser.network
    network.zero_grad(set_to_none=False)
    # The first pass of a shape may include compiling, so the faster of two counts.
    seconds = [min(run_pass(denoiser, shape), run_pass(denoiser, shape)) for shape in shapes]
    gradients = [parameter.grad.flatten().cpu() for parameter in network.parameters()]
    return max(seconds), torch.cat(gradients)


@contextmanager
def trial(network: nn.Module, processes: Processes) -> Iterator[None]:
    """Move all weights a little, to compare gradients within, and restore them afterwards."""
    before = {name: tensor.to("cpu", copy=True) for name, tensor in network.state_dict().items()}
    try:
        # Some weights of a new network are zero, and then most gradients are zero, too.
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        # The processes do not wait for each other's gradients, as one of them may fail.
        with processes.accumulating(network, last=False):
            yield
    finally:
        network.load_state_dict(before)
        # With several processes gradients lie in DDP's buckets, where they are zeroed in place.
        network.zero_grad(set_to_none=processes.count == 1)
