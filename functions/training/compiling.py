"""On CUDA the network that is trained is compiled as a whole, where that saves more time than it takes."""

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
    "realize_reads_threshold": 32,
    "realize_acc_reads_threshold": 32,
    "realize_opcount_threshold": 200,
}
# Of the gradient's norm; PyTorch 2.13 on a CPU compiled bfloat16 wrongly, by 0.15 and more
TOLERANCE = 0.1


def compiled_if_worth_it(
    denoiser: Denoiser, network: nn.Module, run: Run, passes: list[slice], processes: Processes
) -> Denoiser:
    """The denoiser to train with: of `network`, which is the denoiser's as `Processes.wrap` returned it, or compiled.

    It is compiled for all sizes of a step's `passes`, and tried, before the first step. Compiled it keeps all that
    backward needs, as a compiler that is to repeat norms repeats convolutions too.
    """
    config, eager = run.experiment.diffusion, replace(denoiser, network=network)
    if torch.device(run.facts["device"]).type not in DEVICES:
        return eager
    for field, value in {"compile": "off", "deterministic": True, "recompute": "blocks"}.items():
        if getattr(config, field) == value:
            processes.say(f"  compiling  is left out, with {field} = {value}")
            return eager
    shapes = {(places.stop - places.start, *run.image_shape) for places in passes}
    takes, steps = COMPILING * len(shapes), run.facts["total_steps"] - run.first_step
    with trial(network, processes):
        before, expected = tried(eager, shapes)
        saved = SAVED * before * len(passes) * steps
        worth_it = processes.from_main(lambda: saved > takes)
        processes.say(
            f"  compiling  {'takes' if worth_it else 'is left out: it would take'} some {takes} s and save some "
            f"{saved:,.0f} s of {steps:,} steps; these are estimates"
        )
        if not worth_it:
            return eager
        start = time.monotonic()
        try:
            denoiser.network.set_recompute("none")
            compiled = replace(
                denoiser, network=torch.compile(network, dynamic=False, options=OPTIONS)
            )
            after, found = tried(compiled, shapes)
            error = ((found - expected).norm() / expected.norm()).item()
            failure = "" if error < TOLERANCE else f"its gradients differ by {error:.0%}"
            took = f"took {time.monotonic() - start:.0f} s; a pass takes {after:.3g} s instead of {before:.3g}"
        except Exception as error:  # whatever a compiler raises
            failure = f"{type(error).__name__}: {short(error)}"
    failure = next(filter(None, processes.gather(failure)), "")
    processes.say(
        f"             {f'failed, so it goes on without: {failure}' if failure else took}"
    )
    denoiser.network.set_recompute(config.recompute if failure else "none")
    return eager if failure else compiled


def tried(denoiser: Denoiser, shapes: set[tuple[int, ...]]) -> tuple[float, Tensor]:
    """The seconds of the slowest pass of images in one of these shapes, best of two, and the gradients of all."""
    denoiser.network.zero_grad(set_to_none=False)
    seconds = max(min(run_pass(denoiser, shape) for _ in range(2)) for shape in shapes)
    return seconds, torch.cat(
        [parameter.grad.flatten().cpu() for parameter in denoiser.network.parameters()]
    )


@contextmanager
def trial(network: nn.Module, processes: Processes) -> Iterator[None]:
    """Within, no weight is zero, as some are at first and then most gradients; afterwards all is as before.

    The processes do not wait for each other's gradients, as one of them may fail.
    """
    before = {name: tensor.to("cpu", copy=True) for name, tensor in network.state_dict().items()}
    try:
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        with processes.accumulating(network, last=False):
            yield
    finally:
        network.load_state_dict(before)
        network.zero_grad(set_to_none=processes.count == 1)
