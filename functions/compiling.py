"""Whether to compile parts of the network, and whether that works here."""

import time
from collections.abc import Sequence

import torch
from torch import nn

from functions.device import autocast
from functions.processes import ALONE, Processes

# Optimiser steps of a run from which on a cold start of at most minutes is less than a hundredth of it
PAYS_AFTER = 2000


def wants_compiling(setting: str, device: torch.device, total_steps: int, saved: dict | None) -> bool:
    """What the config's `compile` means here: "on", "off", or "auto", on CUDA in a long run.

    Args:
        saved: what `functions.device.arithmetic` gave when the run was started, to which "auto" holds; None: a new run.
    """
    if setting != "auto":
        return setting == "on"
    if saved:
        return saved["compiled"]
    return device.type == "cuda" and total_steps >= PAYS_AFTER


def compile_norms(
    networks: Sequence[nn.Module], device: torch.device, precision: torch.dtype, processes: Processes = ALONE
) -> bool:
    """Compile the norms and activations of some `UNet`s of one config; whether that worked, in all processes.

    A forward and a backward pass of two images show it, and take the time of the cold start. Where it does not work
    (no compiler, no Triton, an operation that it cannot handle), the networks go on as they were.
    """
    start, reason = time.perf_counter(), ""
    for network in networks:
        network.set_execution(network.recompute, compiled=True)
    try:
        one_pass(networks[0], device, precision)
    except Exception as error:  # a compiler and all that it calls can fail in any way
        reason = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')[:200]}"
    worked = not processes.any(bool(reason))
    if not worked:
        for network in networks:
            network.set_execution(network.recompute, compiled=False)
    processes.say(
        f"norms and activations were compiled in {time.perf_counter() - start:.0f} s" if worked
        else f"note: torch.compile does not work here, going on without ({reason or 'in another process'})"
    )  # fmt: skip
    return worked


def one_pass(network: nn.Module, device: torch.device, precision: torch.dtype) -> None:
    """Forward and backward of two images; their gradients are thrown away."""
    images = torch.zeros(2, network.channels, network.image_size, network.image_size, device=device)
    try:
        with autocast(device, precision):
            eps = network(images, torch.zeros(2, dtype=torch.int64, device=device))
        eps.sum().backward()
    finally:
        for parameter in network.parameters():
            parameter.grad = None
