"""Find a batch size that fits in memory before the first step, and estimate the run's cost."""

import copy
import gc
import time

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from config import Experiment
from functions.losses import denoising_loss
from functions.optimizers import Adam
from functions.prediction import Denoiser
from functions.support.device import is_out_of_memory
from functions.support.errors import UserError
from functions.support.processes import Processes


def describe_compute(
    experiment: Experiment, denoiser: Denoiser, optimizer: Adam, steps: int, processes: Processes
) -> str:
    """Describe the cost of the remaining steps: FLOPs (counted) and hours (from timed passes).

    The passes have the batch size that `fit_memory` finds, as in the run, unless one image takes a
    second or more. Then a pass of one image is timed. The steps of the optimiser are real ones, so
    nothing can be trained afterwards.
    """
    effective_batch = experiment.diffusion.effective_batch
    # The pass of one image also warms up the device.
    image_count = 1
    seconds = 0.0
    shape = (image_count, *experiment.model.image_shape)
    if pass_fits(denoiser, shape):
        seconds = run_pass(denoiser, shape)
    if not processes.any(seconds >= 1):
        fitting = fit_memory(experiment, denoiser, processes)
        image_count = min(fitting.diffusion.batch_size, len(processes.shard(effective_batch)))
        shape = (image_count, *experiment.model.image_shape)
        seconds = min(run_pass(denoiser, shape) for _ in range(2))
    flops = effective_batch * flops_of_image(denoiser.network)
    # The first step warms up. The gradients are those of the last pass, as in training.
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    wait(denoiser)
    flops += counter.get_total_flops()
    start = time.perf_counter()
    optimizer.step()
    wait(denoiser)
    seconds_of_step = effective_batch * seconds / image_count + time.perf_counter() - start
    hours = seconds_of_step * steps / 3600
    device = next(denoiser.network.parameters()).device
    return (
        f"  compute    {flops / 1e12:.3g} TFLOP a step; the {steps:,} steps to go take about "
        f"{hours:,.2f} hours on one {device}, by timing\n"
        f"             forward and backward of {image_count}"
    )


def wait(denoiser: Denoiser) -> None:
    """Wait until the device has finished; reading a number does so on every device."""
    next(denoiser.network.parameters()).sum().item()


def flops_of_image(network: nn.Module) -> int:
    """Count the FLOPs of forward and backward of one image, recomputation included."""
    # On the meta device tensors have shapes but no data, so nothing is computed.
    network = copy.deepcopy(network).to("meta")
    image = torch.empty(1, network.channels, network.image_size, network.image_size, device="meta")
    t = torch.zeros(1, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        network(image, t).sum().backward()
    return counter.get_total_flops()


def fit_memory(experiment: Experiment, denoiser: Denoiser, processes: Processes) -> Experiment:
    """Return the experiment with the largest batch_size whose pass fits in every process's memory.

    The first attempt is the configured batch_size. The next ones are the smaller divisors of the
    effective batch, which stays the same because gradient_accumulation grows. So the result stays
    the same, except for dropout, whose masks are seeded per pass. Raises UserError if not even one
    image fits.
    """
    config = experiment.diffusion
    effective = config.effective_batch
    share = len(processes.shard(effective))
    sizes = [size for size in range(config.batch_size, 0, -1) if effective % size == 0]
    for size in sizes:
        fits = pass_fits(denoiser, (min(size, share), *experiment.model.image_shape))
        if not processes.any(not fits):
            break
        processes.print_main(f"out of memory with batch_size = {size}")
    else:
        raise UserError(
            "out of memory with one image at a time: use a smaller base_dim, or another device"
        )

    if size == config.batch_size:
        return experiment
    changes = {"batch_size": size, "gradient_accumulation": effective // size}
    changed = ", ".join(f"{name} = {value}" for name, value in changes.items())
    processes.print_main(f"continuing with {changed}")
    return experiment.override(changes, {})


def pass_fits(denoiser: Denoiser, shape: tuple[int, ...]) -> bool:
    """Return whether forward and backward of images in this shape fit in memory."""
    network = denoiser.network
    try:
        # In training, the later passes of a step share the memory with gradients and with the
        # optimiser's moments, which are already allocated.
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        run_pass(denoiser, shape)
        return True
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        network.zero_grad()
        # `torch.utils.checkpoint` creates reference cycles, whose memory only `collect` frees.
        gc.collect()
        # Without CUDA this does nothing.
        torch.cuda.empty_cache()


def run_pass(denoiser: Denoiser, shape: tuple[int, ...], scale: float = 1) -> float:
    """Run forward and backward on the same noise in every call, and return the seconds they take.

    The loss is the squared error, summed over pixels and images, times `scale`.
    """
    torch.manual_seed(0)
    start = time.perf_counter()
    weight = next(denoiser.network.parameters())
    x_0 = torch.randn(shape, device=weight.device)
    t = torch.zeros(len(x_0), dtype=torch.int64, device=weight.device)
    losses = denoising_loss(denoiser, denoiser.scheduler, x_0, t, x_0)
    # A mean over pixels would have gradients that are too small for float16.
    (scale * x_0[0].numel() * losses).sum().backward()
    # `item` waits until the device is done.
    weight.grad.sum().item()
    return time.perf_counter() - start
