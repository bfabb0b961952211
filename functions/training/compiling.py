"""Compile the network for training on CUDA."""

from dataclasses import replace

import torch
from torch import nn

from config import DiffusionConfig
from functions.prediction import Denoiser
from functions.support.files import short
from functions.support.processes import Processes
from functions.training.cost import run_pass

# PyTorch compiles for CPUs, too, but there the network would not be faster.
DEVICES = ("cuda",)


def compile_network(
    network: nn.Module,
    denoiser: Denoiser,
    config: DiffusionConfig,
    scaler: torch.amp.GradScaler,
    batch_sizes: set[int],
    processes: Processes,
) -> nn.Module:
    """Return `network` compiled, or `network` itself if it cannot be compiled in every process.

    `network` is the denoiser's network as `Processes.wrap` returned it. The compiler works here,
    before the first step, for forward and backward of each batch size.
    """
    model = denoiser.network
    device = next(model.parameters()).device
    if device.type not in DEVICES or config.deterministic:
        reason = "deterministic = True" if config.deterministic else f"the device is {device.type}"
        processes.print_main(f"the network is not compiled, as {reason}")
        return network

    processes.print_main("compiling the network, which takes some minutes")
    compiled = torch.compile(network, dynamic=False)
    trial = replace(denoiser, network=compiled)
    image_shape = (model.channels, model.image_size, model.image_size)
    failure = ""
    try:
        # A missing C compiler is noticed only in the first backward pass. The processes do not
        # exchange gradients: if one of them failed, the others would wait for it.
        with processes.gradient_sync(network, last=False):
            for batch_size in sorted(batch_sizes):
                run_pass(trial, (batch_size, *image_shape), scaler.get_scale())
    except Exception as error:
        # Compilers raise errors of any kind, and training can go on after each of them.
        failure = f"{type(error).__name__}: {short(error)}"
    # Here the error is gone, and with its traceback the memory of the failed pass.
    network.zero_grad(set_to_none=processes.count == 1)

    # All processes must train the same network.
    for reason in processes.gather(failure):
        if reason:
            processes.print_main(f"compiling failed, so training goes on without: {reason}")
            return network
    return compiled
