"""On CUDA the network that is trained is compiled, where that saves more time than it takes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from config import DiffusionConfig
from functions.prediction import Denoiser
from functions.support.files import short
from functions.support.processes import Processes
from functions.training.memory import run_pass

DEVICES = ("cuda",)
# Compiling for one shape takes about so many seconds.
COMPILING = 240
# A compiled pass saves about this part of a pass's time, by the bytes that were counted for
# benchmarks/NOTES.md.
SHARE_SAVED = 0.5
OPTIONS = {
    # Dropout is drawn as without a compiler.
    "fallback_random": True,
    # What is cheap is computed again and not kept: a pass moves 25 GB, not 30, by the same count.
    "realize_reads_threshold": 32,
    "realize_acc_reads_threshold": 32,
    "realize_opcount_threshold": 200,
}
# Each parameter's compiled gradient may differ by this part of the plain gradient's norm. Rounding
# to bfloat16 changed none by more than 0.065, in the presets' networks. PyTorch 2.13 on a CPU
# compiled bfloat16 wrongly: all gradients together differed by 0.15 and more.
TOLERANCE = 0.1
# This part of the norm of all gradients is added to that of each. The biases of keys need it: they
# change no softmax, so their gradients are only rounding, of up to 2e-6 of all. In the presets'
# networks each other parameter has at least 3.7e-5 of all.
FLOOR = 3e-5
# Gradients that are not finite after so many halvings are a fault.
MOST_HALVINGS = 20


def compiled_if_worth_it(
    denoiser: Denoiser,
    network: nn.Module,
    config: DiffusionConfig,
    passes: list[slice],
    steps: int,
    processes: Processes,
) -> Denoiser:
    """Return the denoiser to train with, either of `network` or of `network` compiled.

    `network` is the denoiser's network, wrapped by `Processes.wrap`. It is compiled and tried
    before the first step, for all sizes of a step's `passes`, if that pays off in so many `steps`.
    """
    eager = replace(denoiser, network=network)
    model = denoiser.network
    device = next(model.parameters()).device
    if device.type not in DEVICES or not is_allowed(config, processes):
        return eager

    # The network is compiled by itself for each shape that a pass has.
    image_shape = (model.channels, model.image_size, model.image_size)
    shapes = {(batch_slice.stop - batch_slice.start, *image_shape) for batch_slice in passes}
    with trial(network, processes):
        seconds, expected = tried(eager, shapes)
        if not is_worth_it(seconds * len(passes) * steps, len(shapes), steps, processes):
            return eager

        start = time.monotonic()
        try:
            # The compiled network keeps all that backward needs. If it were to recompute norms, the
            # compiler would recompute convolutions as well.
            model.set_recompute("none")
            compiled_network = torch.compile(network, dynamic=False, options=OPTIONS)
            compiled = replace(denoiser, network=compiled_network)
            compiled_seconds, gradients = tried(compiled, shapes)
            difference = largest_difference(gradients, expected, network)
            failure = ""
            if compiled_seconds >= seconds:
                failure = f"it is slower: {compiled_seconds:.3g} s a pass instead of {seconds:.3g}"
            # A gradient that is not a number fails, too.
            if not difference < TOLERANCE:
                failure = f"its gradients differ by {difference:.0%}"
        except Exception as error:
            # Compilers fail with errors of any kind, and training can go on after all of them.
            failure = f"{type(error).__name__}: {short(error)}"
        took = time.monotonic() - start

    # The processes use the same network, so after a failure in one of them all go on without.
    for reason in processes.gather(failure):
        if reason:
            processes.print_main(f"             failed, so it goes on without: {reason}")
            model.set_recompute(config.recompute)
            return eager
    processes.print_main(
        f"             took {took:.0f} s; "
        f"a pass takes {compiled_seconds:.3g} s instead of {seconds:.3g}"
    )
    return compiled


def is_allowed(config: DiffusionConfig, processes: Processes) -> bool:
    """Return whether the config allows compiling; print which field does not."""
    for field, value in {"compile": "off", "deterministic": True, "recompute": "blocks"}.items():
        if getattr(config, field) == value:
            processes.print_main(f"  compiling  is left out, with {field} = {value}")
            return False
    return True


def is_worth_it(seconds: float, shapes: int, steps: int, processes: Processes) -> bool:
    """Estimate and print what compiling takes and saves; return whether it saves more.

    `seconds` is the time of all passes of these steps without it, `shapes` the number of their
    shapes.
    """
    takes = COMPILING * shapes
    saves = SHARE_SAVED * seconds
    # Each process has timed its own passes, so rank 0 decides for all.
    worth_it = processes.on_main(lambda: saves > takes)
    verb = "takes" if worth_it else "is left out: it would take"
    processes.print_main(
        f"  compiling  {verb} some {takes} s and save some {saves:,.0f} s of {steps:,} steps; "
        "these are estimates"
    )
    return worth_it


def tried(denoiser: Denoiser, shapes: set[tuple[int, ...]]) -> tuple[float, Tensor]:
    """Return the seconds of a pass in the slowest of these shapes, and a gradient.

    The gradient is that of all parameters, one after the other, summed over all passes tried.
    """
    network = denoiser.network
    # Large gradients overflow in float16. As in training, the loss is halved until none do.
    for halvings in range(MOST_HALVINGS):
        scale = 0.5**halvings
        network.zero_grad(set_to_none=False)
        # The first pass of a shape may include compiling, so the faster of two counts.
        seconds = [min(run_pass(denoiser, shape, scale) for _ in range(2)) for shape in shapes]
        gradients = torch.cat(
            [parameter.grad.flatten().cpu() for parameter in network.parameters()]
        )
        if gradients.isfinite().all():
            break
    return max(seconds), gradients / scale


def largest_difference(gradients: Tensor, expected: Tensor, network: nn.Module) -> float:
    """Return the largest relative difference of a parameter's gradient, which may be nan.

    Both are gradients of all parameters of the network, as `tried` returns them.
    """
    # All are not compared at once: most of their norm is that of the last layer.
    sizes = [parameter.numel() for parameter in network.parameters()]
    floor = FLOOR * expected.norm()
    differences = [
        (gradient - plain).norm() / (plain.norm() + floor)
        for gradient, plain in zip(gradients.split(sizes), expected.split(sizes), strict=True)
    ]
    return torch.stack(differences).max().item()


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
