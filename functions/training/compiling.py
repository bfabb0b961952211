"""On CUDA the network that is trained is compiled as a whole, where that saves more time than it takes."""

import copy
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
COMPILING = 240  # seconds that it takes: an estimate
SAVED = 0.5  # of a pass's time: an estimate, by the bytes that benchmarks/bytes_moved.py counts
OPTIONS = {
    "fallback_random": True,  # dropout is drawn as without a compiler
    # What is cheap is computed again and not kept: 25 instead of 30 GB of a pass, by the same count
    "realize_reads_threshold": 32, "realize_acc_reads_threshold": 32, "realize_opcount_threshold": 200,
}  # fmt: skip
TOLERANCE = 0.1  # of the gradient's norm; PyTorch 2.13 on a CPU compiled bfloat16 wrongly, by 0.15 and more


def compiled_if_worth_it(
    denoiser: Denoiser, network: nn.Module, run: Run, passes: list[slice], processes: Processes
) -> Denoiser:
    """The denoiser to train with: of `network`, which is the denoiser's as `Processes.wrap` returned it, or compiled.

    It is compiled for all sizes of a step's `passes`, and tried, before the first step. Compiled it keeps all that
    backward needs, as a compiler that is to repeat norms repeats convolutions too.
    """
    config, eager = run.experiment.diffusion, replace(denoiser, network=network)
    on_device = torch.device(run.facts["device"]).type in DEVICES
    if not on_device or config.compile == "off" or config.deterministic or config.recompute == "blocks":
        return eager
    shapes = {(places.stop - places.start, *run.image_shape) for places in passes}
    with trial(network, processes):
        before, expected = tried(eager, shapes)
        steps = run.facts["total_steps"] - run.first_step
        saved = SAVED * before * len(passes) * steps
        worth_it = processes.from_main(lambda: saved > COMPILING)
        processes.say(
            f"  compiling  {'takes' if worth_it else 'is left out: it would take'} some {COMPILING} s and save some "
            f"{saved:,.0f} s of {steps:,} steps; these are estimates"
        )
        if not worth_it:
            return eager
        denoiser.network.set_recompute("none")
        compiled = torch.compile(network, dynamic=False, options=OPTIONS)
        start, failure = time.monotonic(), ""
        try:
            after, found = tried(replace(denoiser, network=compiled), shapes)
            error = ((found - expected).norm() / expected.norm()).item()
            failure = "" if error < TOLERANCE else f"its gradients differ by {error:.0%}"
        except Exception as error:  # whatever a compiler raises
            failure = f"{type(error).__name__}: {short(error)}"
    failures = list(filter(None, processes.gather(failure)))
    if failures:
        denoiser.network.set_recompute(config.recompute)
        processes.say(f"             failed, so it goes on without: {failures[0]}")
        return eager
    seconds = time.monotonic() - start
    processes.say(
        f"             took {seconds:.0f} s; a pass takes {1000 * after:.3g} ms instead of {1000 * before:.3g}"
    )
    return replace(denoiser, network=compiled)


def tried(denoiser: Denoiser, shapes: set[tuple[int, ...]]) -> tuple[float, Tensor]:
    """The seconds of the slowest pass of images in one of these shapes, best of two, and the gradients of all."""
    torch.manual_seed(0)
    denoiser.network.zero_grad(set_to_none=False)
    seconds = max(min(run_pass(denoiser, shape) for _ in range(2)) for shape in shapes)
    return seconds, torch.cat([parameter.grad.flatten() for parameter in denoiser.network.parameters()])


@contextmanager
def trial(network: nn.Module, processes: Processes) -> Iterator[None]:
    """Within, no weight is zero, as some are at first and then most gradients; afterwards all is as before.

    The processes do not wait for each other's gradients, as one of them may fail.
    """
    before = copy.deepcopy(network.state_dict())
    try:
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        with processes.accumulating(network, last=False):
            yield
    finally:
        network.load_state_dict(before)
        network.zero_grad(set_to_none=processes.count == 1)
