"""Before the first step: what a training says of itself, and a batch size that fits in memory, found by trying."""

import copy
import gc
import math
import time

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from functions.losses import denoising_loss
from functions.prediction import Denoiser
from functions.support.device import is_out_of_memory
from functions.support.errors import UserError
from functions.support.processes import Processes
from functions.support.run_folder import Run

# x_T with a larger terminal SNR still carries the image; the paper's 1000 steps leave 4e-5
VISIBLE_SNR = 1e-3
H100_PEAK = 989e12  # FLOP/s in dense bfloat16, by its data sheet
H100_SHARE = 0.15  # not measured


def describe(run: Run, data_summary: str) -> str:
    """Some lines about a run: data, split, network, length, schedule; then what is probably not meant."""
    config, facts = run.experiment.diffusion, run.facts
    snr = facts["terminal_snr"]
    done = f"; {run.first_step:,} steps are done" if run.first_step else ""
    warnings = warnings_of(run.experiment)
    if snr > VISIBLE_SNR:
        warnings.append(
            f"terminal SNR {snr:.2g} (sqrt(alpha_bar_T) = {math.sqrt(snr / (1 + snr)):.3f}): x_T still carries the "
            "image, and sampling starts from noise that the model never saw; set rescale_betas = True or use 1000 "
            "timesteps"
        )
    if config.ema_decay == 0:
        warnings.append("ema_decay is 0: no EMA, samples use the raw weights")
    for what, before in run.remembered.get("arithmetic", {}).items():
        if before != facts["arithmetic"].get(what):
            change = f"{what} was {before}, is now {facts['arithmetic'].get(what)}"
            warnings.append(f"{change}: no longer bit for bit as if never stopped")
    return "\n".join(
        [
            run.name,
            f"  data       {data_summary}",
            f"  split      {facts['split']}",
            f"  network    {facts['parameters']:,} parameters, {facts['arithmetic']['precision']}, {facts['device']}",
            f"  length     {facts['total_steps']:,} steps of {config.effective_batch} images: "
            f"{config.epochs} epochs of {facts['steps_per_epoch']:,} steps{done}",
            *([f"  begins as  {facts['initial']}"] if facts.get("initial") else []),
            f"  objective  {config.objective}, t {config.t_sampling} over {config.timesteps_diff} timesteps with "
            f"{config.beta_schedule} betas, terminal SNR {snr:.2g}",
            *(f"warning: {warning}" for warning in warnings),
        ]
    )


def warnings_of(experiment: object) -> list[str]:
    """What an `Experiment` of config.py allows and probably does not mean."""
    warnings, groups, narrowest = [], experiment.model.norm_groups, min(experiment.model.dims)
    if narrowest / groups < 2:
        warnings.append(
            f"norm_groups = {groups} leaves {narrowest / groups:g} channel a group at the narrowest level; the norm "
            "then erases each channel's mean and samples come out tinted: leave at least 4"
        )
    if experiment.diffusion.max_rotation > 0 and not experiment.diffusion.use_augmentation:
        warnings.append("max_rotation has no effect without use_augmentation = True")
    return warnings


def describe_compute(run: Run, denoiser: Denoiser) -> str:
    """FLOPs of a step, counted; the hours of the steps to go, on this device by trying, on an H100 by assumption."""
    config, steps = run.experiment.diffusion, run.facts["total_steps"] - run.first_step
    flops = config.effective_batch * flops_of_image(denoiser.network)
    run_pass(denoiser, (1, *run.image_shape))  # warms up
    images, seconds = 1, run_pass(denoiser, (1, *run.image_shape))
    if seconds < 1:
        images = config.batch_size
        seconds = min(run_pass(denoiser, (images, *run.image_shape)) for _ in range(2))
    here = config.effective_batch * seconds / images * steps / 3600
    on_h100 = flops * steps / (H100_SHARE * H100_PEAK) / 3600
    return (
        f"  compute    {flops / 1e12:.3g} TFLOP a step; the {steps:,} steps to go take about {here:,.2f} hours on one "
        f"{run.facts['device']}, by timing\n             forward and backward of {images}, and {on_h100:,.2f} on one "
        f"H100 at {H100_SHARE:.0%} of its {H100_PEAK / 1e12:.0f} TFLOP/s, which is assumed, not measured"
    )


def flops_of_image(network: nn.Module) -> int:
    """FLOPs of an image's forward and backward pass, what is recomputed included, on a copy that has no memory."""
    network = copy.deepcopy(network).to("meta")
    image = torch.empty(1, network.channels, network.image_size, network.image_size, device="meta")
    with FlopCounterMode(display=False) as counter:
        network(image, torch.zeros(1, dtype=torch.int64, device="meta")).sum().backward()
    return counter.get_total_flops()


def fit_memory(run: Run, denoiser: Denoiser, processes: Processes) -> None:
    """Give the run a batch_size that fits in memory in every process.

    One forward and backward pass is tried before the first step; `TrainingState` has made Adam's moments. Where it does
    not fit, the next smaller divisor of the effective batch becomes batch_size, and gradient_accumulation makes up for
    it, so that the result stays the same. After 1 comes recompute = "blocks", then UserError.
    """
    config = run.experiment.diffusion
    effective, most = config.effective_batch, len(processes.own_range(config.effective_batch))
    attempts = [
        (size, config.recompute)
        for size in range(config.batch_size, 0, -1)
        if effective % size == 0
    ]
    if config.recompute != "blocks":
        attempts.append((1, "blocks"))
    for size, recompute in attempts:
        denoiser.network.set_recompute(recompute)
        if not processes.any(not pass_fits(denoiser, (min(size, most), *run.image_shape))):
            break
        processes.say(f"out of memory with batch_size = {size}, recompute = {recompute!r}")
    else:
        raise UserError(
            "out of memory with one image at a time: take a smaller base_dim, or another device"
        )
    if (size, recompute) != (config.batch_size, config.recompute):
        changes = {
            "batch_size": size,
            "gradient_accumulation": effective // size,
            "recompute": recompute,
        }
        processes.say(
            f"going on with {', '.join(f'{name} = {value}' for name, value in changes.items())}"
        )
        run.experiment = run.experiment.override(changes, {})
        run.facts["arithmetic"]["batch_size"] = size


def pass_fits(denoiser: Denoiser, shape: tuple[int, ...]) -> bool:
    """Whether a forward and backward pass of images in this shape fits in memory; leaves no gradients."""
    network = denoiser.network
    try:
        # Gradients are there in all passes of a step but the first
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        run_pass(denoiser, shape)
        return True
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        network.zero_grad()
        gc.collect()  # of what did not fit: checkpoints refer to themselves
        if next(network.parameters()).device.type == "cuda":
            torch.cuda.empty_cache()


def run_pass(denoiser: Denoiser, shape: tuple[int, ...]) -> float:
    """Forward and backward, of the same images of noise each time; returns the seconds that it took."""
    torch.manual_seed(0)
    start, weight = time.perf_counter(), next(denoiser.network.parameters())
    x_0 = torch.randn(shape, device=weight.device)
    t = torch.zeros(len(x_0), dtype=torch.int64, device=weight.device)
    losses = denoising_loss(denoiser, denoiser.scheduler, x_0, t, x_0)
    # Not the mean, whose gradients would be too small for float16
    (x_0[0].numel() * losses).sum().backward()
    weight.grad.sum().item()  # waits until the device is done
    return time.perf_counter() - start
