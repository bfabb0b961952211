"""Compile the network for training on CUDA."""

from dataclasses import replace

import torch
from torch import nn

from functions.support.files import short
from functions.training.cost import run_pass
from functions.training.run import TrainingRun


def compile_network(network: nn.Module, run: TrainingRun, batch_sizes: set[int]) -> nn.Module:
    """Return `network` compiled, or `network` itself if it cannot be compiled in every process.

    `network` is the run's network as `Processes.wrap` returned it. The compiler works here, before
    the first step, for forward and backward of each batch size.
    """
    processes = run.processes
    processes.print_main("compiling the network, which takes some minutes")
    compiled = torch.compile(network, dynamic=False)
    trial = replace(run.denoiser, network=compiled)
    image_shape = run.experiment.model.image_shape
    failure = ""
    try:
        # A missing C compiler is noticed only in the first backward pass. The processes do not
        # exchange gradients: if one of them failed, the others would wait for it.
        with processes.gradient_sync(network, last=False):
            for batch_size in sorted(batch_sizes):
                run_pass(trial, (batch_size, *image_shape), run.scaler.get_scale())
    except Exception as error:
        # Compilers raise errors of any kind, and training can go on after each of them.
        failure = f"{type(error).__name__}: {short(error)}"
    # Here the error is gone, and with its traceback the memory of the failed pass.
    processes.clear_gradients(run.optimizer)

    # All processes must train the same network.
    for reason in processes.gather(failure):
        if reason:
            processes.print_main(f"compiling failed, so training goes on without: {reason}")
            run.facts["arithmetic"]["compiled"] = False
            return network
    return compiled
