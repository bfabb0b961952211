"""Before the first step: a batch size that fits in memory, and what the steps will cost."""

import copy
import gc
import time

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from config import Experiment
from functions.losses import denoising_loss
from functions.prediction import Denoiser
from functions.support.device import is_out_of_memory
from functions.support.errors import UserError
from functions.support.processes import Processes


def describe_compute(
    experiment: Experiment, denoiser: Denoiser, steps: int, processes: Processes
) -> str:
    """Describe what the steps to go cost: FLOPs by counting, and hours on this device by trying.

    As in the run itself, `fit_memory` comes before whole batches.
    """
    effective_batch = experiment.diffusion.effective_batch
    # The first pass warms up. Where one image takes long, it is enough to tell.
    images = 1
    seconds = 0.0
    shape = (images, *experiment.model.image_shape)
    if pass_fits(denoiser, shape):
        seconds = run_pass(denoiser, shape)
    if not processes.any(seconds >= 1):
        fitting = fit_memory(experiment, denoiser, processes)
        images = min(fitting.diffusion.batch_size, len(processes.shard(effective_batch)))
        shape = (images, *experiment.model.image_shape)
        seconds = min(run_pass(denoiser, shape) for _ in range(2))
    # What is recomputed counts, and `fit_memory` may have changed it.
    flops = effective_batch * flops_of_image(denoiser.network)
    hours = effective_batch * seconds / images * steps / 3600
    device = next(denoiser.network.parameters()).device
    return (
        f"  compute    {flops / 1e12:.3g} TFLOP a step; the {steps:,} steps to go take about "
        f"{hours:,.2f} hours on one {device}, by timing\n"
        f"             forward and backward of {images}"
    )


def flops_of_image(network: nn.Module) -> int:
    """Count the FLOPs of an image's forward and backward pass, recomputation included."""
    # On the meta device tensors have shapes and no memory, so nothing is computed.
    network = copy.deepcopy(network).to("meta")
    image = torch.empty(1, network.channels, network.image_size, network.image_size, device="meta")
    t = torch.zeros(1, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        network(image, t).sum().backward()
    return counter.get_total_flops()


def fit_memory(experiment: Experiment, denoiser: Denoiser, processes: Processes) -> Experiment:
    """Return the experiment with a batch_size that fits in every process's memory, by trying.

    Where a pass does not fit, the next smaller divisor of the effective batch becomes batch_size
    and gradient_accumulation makes up for it, so that the result stays the same, but for dropout,
    whose masks have a seed for each pass. After 1 comes recompute = "blocks", then UserError.
    """
    config = experiment.diffusion
    effective = config.effective_batch
    share = len(processes.shard(effective))
    sizes = [size for size in range(config.batch_size, 0, -1) if effective % size == 0]
    attempts = [(size, config.recompute) for size in sizes]
    if config.recompute != "blocks":
        attempts.append((1, "blocks"))

    for size, recompute in attempts:
        denoiser.network.set_recompute(recompute)
        fits = pass_fits(denoiser, (min(size, share), *experiment.model.image_shape))
        if not processes.any(not fits):
            break
        processes.print_main(f"out of memory with batch_size = {size}, recompute = {recompute!r}")
    else:
        raise UserError(
            "out of memory with one image at a time: take a smaller base_dim, or another device"
        )

    if (size, recompute) == (config.batch_size, config.recompute):
        return experiment
    changes = {
        "batch_size": size,
        "gradient_accumulation": effective // size,
        "recompute": recompute,
    }
    changed = ", ".join(f"{name} = {value}" for name, value in changes.items())
    processes.print_main(f"going on with {changed}")
    return experiment.override(changes, {})


def pass_fits(denoiser: Denoiser, shape: tuple[int, ...]) -> bool:
    """Try whether forward and backward of images in this shape fit in memory."""
    network = denoiser.network
    try:
        # A step's later passes find gradients in memory, as they find Adam's moments, which
        # `TrainingState` has made.
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
        # Checkpoints refer to themselves, so what did not fit stays until it is collected.
        gc.collect()
        # This does nothing where CUDA is not in use.
        torch.cuda.empty_cache()


def run_pass(denoiser: Denoiser, shape: tuple[int, ...], scale: float = 1) -> float:
    """Run forward and backward of the same noise each time, and return the seconds that it took.

    The loss is the squared error, summed over pixels and images, times `scale`.
    """
    torch.manual_seed(0)
    start = time.perf_counter()
    weight = next(denoiser.network.parameters())
    x_0 = torch.randn(shape, device=weight.device)
    t = torch.zeros(len(x_0), dtype=torch.int64, device=weight.device)
    losses = denoising_loss(denoiser, denoiser.scheduler, x_0, t, x_0)
    # The gradients of the mean over pixels would be too small for float16.
    (scale * x_0[0].numel() * losses).sum().backward()
    # The number reaches the host when the device is done.
    weight.grad.sum().item()
    return time.perf_counter() - start
