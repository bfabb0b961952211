"""Compile the network for training on CUDA."""

from dataclasses import replace

import torch
from torch import nn

from functions.support.device import is_out_of_memory
from functions.support.errors import UserError
from functions.support.files import short
from functions.training.cost import run_pass
from functions.training.run import TrainingRun


def compile_network(network: nn.Module, run: TrainingRun, batch_sizes: set[int]) -> nn.Module:
    """Return `network`, the run's as `Processes.wrap` returned it, compiled.

    The compiler works here, before the first step, for forward and backward of each batch size.
    Raises UserError when it fails, for example because there is no C compiler.
    """
    run.processes.print_main("compiling the network, which takes some minutes")
    compiled = torch.compile(network, dynamic=False)
    trial = replace(run.denoiser, network=compiled)
    image_shape = run.experiment.model.image_shape
    try:
        # A missing C compiler is noticed only in the first backward pass. The processes do not
        # exchange gradients: if one of them failed, the others would wait for it.
        with run.processes.gradient_sync(network, last=False):
            for batch_size in sorted(batch_sizes):
                run_pass(trial, (batch_size, *image_shape), run.scaler.get_scale())
    except Exception as error:
        # train.py says how to use less memory.
        if is_out_of_memory(error):
            raise
        # Compilers raise errors of any kind.
        raise UserError(
            f"compiling failed ({type(error).__name__}: {short(error)}); "
            "to train without it, add --diffusion.compile false"
        ) from error
    run.optimizer.zero_grad()
    return compiled
