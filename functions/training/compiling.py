"""Compile the network for training on CUDA, if this saves more time than it takes."""

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
# Compiling for one shape takes about this many seconds.
COMPILE_SECONDS = 240
# A compiled pass saves about this fraction of a pass's time, estimated from the bytes that are
# counted in benchmarks/NOTES.md.
SAVED_FRACTION = 0.5
OPTIONS = {
    # Dropout draws the same random numbers as without compiling.
    "fallback_random": True,
    # Cheap tensors are recomputed instead of kept. By the same count, a pass then moves 25 GB
    # instead of 30.
    "realize_reads_threshold": 32,
    "realize_acc_reads_threshold": 32,
    "realize_opcount_threshold": 200,
}
# Each parameter's compiled gradient may differ by this fraction of the plain gradient's norm. In
# the presets' networks, rounding to bfloat16 changed no gradient by more than 0.065. PyTorch 2.13
# on a CPU compiled bfloat16 wrongly: the gradient of all parameters differed by 0.15 and more.
TOLERANCE = 0.1
# This fraction of the norm of all gradients together is added to the norm of each. The biases of
# keys need this: they cancel in the softmax, so their gradients are only rounding errors, at most
# 2e-6 of the norm of all. In the presets' networks every other gradient has at least 3.7e-5 of it.
FLOOR = 3e-5
# Gradients that are still not finite after this many halvings of the loss are an error.
MOST_HALVINGS = 20


def compile_if_worth_it(
    denoiser: Denoiser,
    network: nn.Module,
    config: DiffusionConfig,
    passes: list[slice],
    steps: int,
    processes: Processes,
) -> Denoiser:
    """Return the denoiser to train with, whose network is `network` or its compiled form.

    `network` is the denoiser's network as `Processes.wrap` returned it. If compiling saves time
    over this many `steps`, `network` is compiled before the first step, for the batch size of each
    pass in `passes`. Then its gradients are compared with those of the plain network.
    """
    eager = replace(denoiser, network=network)
    model = denoiser.network
    device = next(model.parameters()).device
    if device.type not in DEVICES or not is_allowed(config, processes):
        return eager

    # Each shape of a batch is compiled separately.
    image_shape = (model.channels, model.image_size, model.image_size)
    shapes = {(batch_slice.stop - batch_slice.start, *image_shape) for batch_slice in passes}
    with perturbed_weights(network, processes):
        seconds, expected = time_and_gradients(eager, shapes)
        if not is_worth_it(seconds * len(passes) * steps, len(shapes), steps, processes):
            return eager

        start = time.monotonic()
        try:
            # With "norms" the compiler would also recompute convolutions, so the compiled network
            # recomputes nothing.
            model.set_recompute("none")
            compiled_network = torch.compile(network, dynamic=False, options=OPTIONS)
            compiled = replace(denoiser, network=compiled_network)
            compiled_seconds, gradients = time_and_gradients(compiled, shapes)
            difference = largest_difference(gradients, expected, network)
            failure = ""
            if compiled_seconds >= seconds:
                failure = f"it is slower: {compiled_seconds:.3g} s per pass, not {seconds:.3g}"
            # This condition is also true if the difference is nan.
            if not difference < TOLERANCE:
                failure = f"its gradients differ by {difference:.0%}"
        except Exception as error:
            # Compilers raise errors of any kind, and training can continue after any of them.
            failure = f"{type(error).__name__}: {short(error)}"
        compile_seconds = time.monotonic() - start

    # All processes must train the same network. So if compiling fails in one, none uses it.
    for reason in processes.gather(failure):
        if reason:
            processes.print_main(f"             failed, so training continues without it: {reason}")
            model.set_recompute(config.recompute)
            return eager
    processes.print_main(
        f"             took {compile_seconds:.0f} s; "
        f"a pass takes {compiled_seconds:.3g} s instead of {seconds:.3g}"
    )
    return compiled


def is_allowed(config: DiffusionConfig, processes: Processes) -> bool:
    """Return whether the config allows compiling; print the field that forbids it."""
    for field, value in {"compile": "off", "deterministic": True}.items():
        if getattr(config, field) == value:
            processes.print_main(f"  compiling  is off, as {field} = {value}")
            return False
    return True


def is_worth_it(seconds: float, shapes: int, steps: int, processes: Processes) -> bool:
    """Estimate and print the time that compiling takes and saves; return whether it is worth it.

    `seconds` is the time that all passes of these steps take without compiling. `shapes` is the
    number of shapes to compile for.
    """
    cost = COMPILE_SECONDS * shapes
    saving = SAVED_FRACTION * seconds
    # The processes have measured different times, so rank 0 decides for all.
    worth_it = processes.on_main(lambda: saving > cost)
    verdict = "" if worth_it else "is off; "
    processes.print_main(
        f"  compiling  {verdict}estimate: takes about {cost} s, "
        f"saves about {saving:,.0f} s over {steps:,} steps"
    )
    return worth_it


def time_and_gradients(denoiser: Denoiser, shapes: set[tuple[int, ...]]) -> tuple[float, Tensor]:
    """Return the seconds of one pass in the slowest of these shapes, and the gradients.

    The gradients of all parameters are flattened into one vector (parameters,), and summed over two
    passes of each shape.
    """
    network = denoiser.network
    # Large gradients overflow in float16. As in training, the loss is halved until none overflows.
    for halvings in range(MOST_HALVINGS):
        scale = 0.5**halvings
        network.zero_grad(set_to_none=False)
        # The first pass of a shape may include compiling, so the faster of two passes counts.
        seconds = [min(run_pass(denoiser, shape, scale) for _ in range(2)) for shape in shapes]
        gradients = torch.cat(
            [parameter.grad.flatten().cpu() for parameter in network.parameters()]
        )
        if gradients.isfinite().all():
            break
    return max(seconds), gradients / scale


def largest_difference(gradients: Tensor, expected: Tensor, network: nn.Module) -> float:
    """Return the largest relative difference of a parameter's gradient, which may be nan.

    `gradients` and `expected` are gradients of all parameters, as `time_and_gradients` returns
    them.
    """
    # Each parameter is compared separately, because the last layer has most of the total norm.
    sizes = [parameter.numel() for parameter in network.parameters()]
    floor = FLOOR * expected.norm()
    differences = [
        (gradient - plain).norm() / (plain.norm() + floor)
        for gradient, plain in zip(gradients.split(sizes), expected.split(sizes), strict=True)
    ]
    return torch.stack(differences).max().item()


@contextmanager
def perturbed_weights(network: nn.Module, processes: Processes) -> Iterator[None]:
    """Add noise to all weights within the context, to compare gradients; restore them after it."""
    weights = {name: tensor.to("cpu", copy=True) for name, tensor in network.state_dict().items()}
    try:
        # Some weights of a new network are zero, which would make most gradients zero.
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        # The processes do not exchange gradients here: if one failed, the others would wait for it.
        with processes.gradient_sync(network, last=False):
            yield
    finally:
        network.load_state_dict(weights)
        # With several processes gradients are views of DDP's buckets and are zeroed in place.
        network.zero_grad(set_to_none=processes.count == 1)
