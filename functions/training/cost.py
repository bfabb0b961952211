"""Estimate what a run costs before it starts: FLOPs of a step (counted) and hours (timed)."""

import copy
import time

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from config import Experiment
from functions.losses import denoising_loss
from functions.optimizers import Adam
from functions.prediction import Denoiser


def describe_cost(
    experiment: Experiment, denoiser: Denoiser, optimizer: Adam, steps: int, share: int
) -> str:
    """Describe the cost of the remaining steps, of which this process computes `share` images each.

    The network is not compiled here. The steps of the optimiser are real ones, so nothing can be
    trained afterwards.
    """
    config = experiment.diffusion
    image_shape = experiment.model.image_shape
    # A pass of one image warms up the device. If it takes a second or more, as on a CPU at 128 px,
    # it is the one that is timed.
    image_count = 1
    seconds = run_pass(denoiser, (1, *image_shape))
    if seconds < 1:
        image_count = min(config.batch_size, share)
        seconds = min(run_pass(denoiser, (image_count, *image_shape)) for _ in range(3))

    # The first step warms up. The gradients are those of the last pass, as in training.
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    flops = config.effective_batch * flops_of_image(denoiser.network) + counter.get_total_flops()
    wait(denoiser)
    start = time.perf_counter()
    optimizer.step()
    wait(denoiser)
    seconds_of_step = share * seconds / image_count + time.perf_counter() - start

    device = next(denoiser.network.parameters()).device
    return (
        f"  compute    {flops / 1e12:.3g} TFLOP a step; forward and backward of {image_count} on "
        f"{device}: {seconds:.3g} s\n"
        f"             so the {steps:,} steps to go take about "
        f"{seconds_of_step * steps / 3600:,.2f} hours, not compiled"
    )


def run_pass(denoiser: Denoiser, shape: tuple[int, ...], scale: float = 1.0) -> float:
    """Run forward and backward of a training step on noise, and return the seconds they take.

    `shape` is (B, C, H, W). The loss, which is multiplied by `scale`, and its gradients are those
    of no image.
    """
    device = next(denoiser.network.parameters()).device
    start = time.perf_counter()
    x_0 = torch.randn(shape, device=device)
    t = torch.zeros(len(x_0), dtype=torch.int64, device=device)
    losses = denoising_loss(denoiser, denoiser.scheduler, x_0, t, torch.randn_like(x_0))
    (scale * losses.sum()).backward()
    wait(denoiser)
    return time.perf_counter() - start


def wait(denoiser: Denoiser) -> None:
    """Wait until the device has finished; reading a number does so on every device."""
    next(denoiser.network.parameters()).sum().item()


def flops_of_image(network: nn.Module) -> int:
    """Count the FLOPs of forward and backward of one image."""
    # On the meta device tensors have shapes but no data, so nothing is computed.
    network = copy.deepcopy(network).to("meta")
    image = torch.empty(1, network.channels, network.image_size, network.image_size, device="meta")
    t = torch.zeros(1, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        network(image, t).sum().backward()
    return counter.get_total_flops()
