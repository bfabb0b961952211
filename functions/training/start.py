"""Before the first step: what a training says of itself, and a batch size that fits in memory."""

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

# An x_T with a larger terminal SNR still carries the image. The paper's 1000 steps leave 4e-5.
VISIBLE_SNR = 1e-3
H100_PEAK = 989e12  # FLOP/s in dense bfloat16, by its data sheet
H100_SHARE = 0.15  # not measured


def describe(run: Run, data_summary: str) -> str:
    """Describe a run in some lines: data, split, network, length and schedule; then warnings."""
    config = run.experiment.diffusion
    facts = run.facts
    snr = facts["terminal_snr"]
    length = (
        f"{facts['total_steps']:,} steps of {config.effective_batch} images: "
        f"{config.epochs} epochs of {facts['steps_per_epoch']:,} steps"
    )
    if run.first_step:
        length += f"; {run.first_step:,} steps are done"
    lines = [
        run.name,
        f"  data       {data_summary}",
        f"  split      {facts['split']}",
        f"  network    {facts['parameters']:,} parameters, {facts['arithmetic']['precision']}, "
        f"{facts['device']}",
        f"  length     {length}",
    ]
    if facts.get("initial"):
        lines.append(f"  begins as  {facts['initial']}")
    lines.append(
        f"  objective  {config.objective}, t {config.t_sampling} over {config.timesteps_diff} "
        f"timesteps with {config.beta_schedule} betas, terminal SNR {snr:.2g}"
    )

    warnings = warnings_of(run.experiment)
    if snr > VISIBLE_SNR:
        warnings.append(
            f"terminal SNR {snr:.2g} (sqrt(alpha_bar_T) = {math.sqrt(snr / (1 + snr)):.3f}): x_T "
            "still carries the image, and sampling starts from noise that the model never saw; "
            "set rescale_betas = True or use 1000 timesteps"
        )
    if config.ema_decay == 0:
        warnings.append("ema_decay is 0: no EMA, samples use the raw weights")
    # A resumed run repeats the bits of one that never stopped only in the same arithmetic.
    for name, before in run.remembered.get("arithmetic", {}).items():
        now = facts["arithmetic"].get(name)
        if before != now:
            warnings.append(
                f"{name} was {before}, is now {now}: no longer bit for bit as if never stopped"
            )
    lines.extend(f"warning: {warning}" for warning in warnings)
    return "\n".join(lines)


def warnings_of(experiment: object) -> list[str]:
    """Return what an `Experiment` of config.py allows and probably does not mean."""
    warnings = []
    groups = experiment.model.norm_groups
    channels_of_group = min(experiment.model.dims) / groups
    if channels_of_group < 2:
        warnings.append(
            f"norm_groups = {groups} leaves {channels_of_group:g} channel a group at the narrowest "
            "level; the norm then erases each channel's mean and samples come out tinted: "
            "leave at least 4"
        )
    if experiment.diffusion.max_rotation > 0 and not experiment.diffusion.use_augmentation:
        warnings.append("max_rotation has no effect without use_augmentation = True")
    return warnings


def describe_compute(run: Run, denoiser: Denoiser, processes: Processes) -> str:
    """Describe what the steps to go cost: FLOPs by counting, hours here by trying, and on an H100.

    The hours on an H100 assume H100_SHARE, which nobody has measured. As in the run itself,
    `fit_memory` comes before whole batches.
    """
    config = run.experiment.diffusion
    steps = run.facts["total_steps"] - run.first_step

    # The first pass warms up. Where one image takes long, it is enough to tell.
    images = 1
    seconds = 0.0
    shape = (images, *run.image_shape)
    if pass_fits(denoiser, shape):
        seconds = run_pass(denoiser, shape)
    if not processes.any(seconds >= 1):
        fit_memory(run, denoiser, processes)
        share = len(processes.own_range(config.effective_batch))
        images = min(run.experiment.diffusion.batch_size, share)
        seconds = min(run_pass(denoiser, (images, *run.image_shape)) for _ in range(2))
    # What is recomputed counts, and `fit_memory` may have changed it.
    flops = config.effective_batch * flops_of_image(denoiser.network)
    hours = config.effective_batch * seconds / images * steps / 3600
    hours_on_h100 = flops * steps / (H100_SHARE * H100_PEAK) / 3600
    return (
        f"  compute    {flops / 1e12:.3g} TFLOP a step; the {steps:,} steps to go take about "
        f"{hours:,.2f} hours on one {run.facts['device']}, by timing\n"
        f"             forward and backward of {images}, and {hours_on_h100:,.2f} on one H100 at "
        f"{H100_SHARE:.0%} of its {H100_PEAK / 1e12:.0f} TFLOP/s, which is assumed, not measured"
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


def fit_memory(run: Run, denoiser: Denoiser, processes: Processes) -> None:
    """Give the run a batch_size that fits in the memory of every process, found by trying.

    Where a pass does not fit, the next smaller divisor of the effective batch becomes batch_size
    and gradient_accumulation makes up for it, so that the result stays the same, but for dropout,
    whose masks have a seed for each pass. After 1 comes recompute = "blocks", then UserError.
    """
    config = run.experiment.diffusion
    effective = config.effective_batch
    share = len(processes.own_range(effective))
    sizes = [size for size in range(config.batch_size, 0, -1) if effective % size == 0]
    attempts = [(size, config.recompute) for size in sizes]
    if config.recompute != "blocks":
        attempts.append((1, "blocks"))

    for size, recompute in attempts:
        denoiser.network.set_recompute(recompute)
        fits = pass_fits(denoiser, (min(size, share), *run.image_shape))
        if not processes.any(not fits):
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
        changed = ", ".join(f"{name} = {value}" for name, value in changes.items())
        processes.say(f"going on with {changed}")
        run.experiment = run.experiment.override(changes, {})
        run.facts["arithmetic"]["batch_size"] = size


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
