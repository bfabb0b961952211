"""Whether to compile parts of the network, and whether that works here."""

import time
from collections.abc import Sequence

import torch
from torch import nn

from functions.device import autocast
from functions.processes import ALONE, Processes

# Optimiser steps of a run, from which on it compiles. A prediction: with a cold start of a minute and a tenth less
# time, steps of ffhq-full on an H100 (0.17 s) would break even at 3,500; the rest is a margin.
PAYS_AFTER = 10_000


def wants_compiling(setting: str, device: torch.device, total_steps: int, saved: dict | None) -> bool:
    """What the config's `compile` means here: "on", "off", or "auto", on CUDA in a long run.

    Args:
        saved: what `functions.device.arithmetic` gave when the run was started, to which "auto" holds on CUDA; None for
            a new run.
    """
    if setting != "auto":
        return setting == "on"
    if saved:
        return saved["compiled"] and device.type == "cuda"
    return device.type == "cuda" and total_steps >= PAYS_AFTER


def compile_norms(
    networks: Sequence[nn.Module], device: torch.device, precision: torch.dtype, processes: Processes = ALONE
) -> bool:
    """Compile the norms and activations of some `UNet`s of one config; whether that worked, in all processes.

    All sizes are compiled and checked against the plain functions, which takes the time of the cold start. Where that
    fails (no compiler, no Triton, other numbers), the networks go on as they were.
    """
    start, reason = time.perf_counter(), ""
    try:
        with autocast(device, precision):
            networks[0].check_compiled(device, precision)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler and all that it calls can fail in any way
        reason = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')[:200]}"
    worked = not processes.any(bool(reason))
    if worked:
        for network in networks:
            network.set_execution(network.recompute, compiled=True)
    processes.say(
        f"norms and activations were compiled in {time.perf_counter() - start:.0f} s" if worked
        else f"note: torch.compile does not work here, going on without ({reason or 'in another process'})"
    )  # fmt: skip
    return worked
