"""What a run says of itself before it starts."""

import math
from collections.abc import Sequence

VISIBLE_SNR = 1e-3  # x_T with a larger terminal SNR still carries the image; the paper's 1000 steps leave 4e-5


def describe(
    title: str, config, facts: dict, data_summary: str, first_step: int = 0, warnings: Sequence[str] = ()
) -> str:
    """Some lines about a run: data, split, network, length, schedule; then what is probably not meant.

    Args:
        config: the run's `DiffusionConfig`.
        facts: what config.json holds under `run`.
        data_summary: the data set in one line.
        first_step: where a resumed run goes on.
        warnings: the config's own, added to those about the schedule and the EMA.
    """
    snr, steps = facts["terminal_snr"], facts["total_steps"]
    done = f"; {first_step:,} steps are done" if first_step else ""
    lines = [
        title,
        f"  data       {data_summary}",
        f"  split      {facts['split']}",
        f"  network    {facts['parameters']:,} parameters, {facts['precision']}, {facts['device']}",
        f"  length     {steps:,} steps of {config.effective_batch} images: {config.epochs} epochs of "
        f"{facts['steps_per_epoch']:,} steps{done}",
        f"  schedule   {config.timesteps_diff} timesteps, terminal SNR {snr:.2g}",
        *(f"warning: {warning}" for warning in warnings),
    ]
    if snr > VISIBLE_SNR:
        lines.append(
            f"warning: terminal SNR {snr:.2g} (sqrt(alpha_bar_T) = {math.sqrt(snr / (1 + snr)):.3f}): x_T still "
            "carries the image, and sampling starts from noise that the model never saw; set rescale_betas = True or "
            "use 1000 timesteps"
        )
    if config.ema_decay == 0:
        lines.append("warning: ema_decay is 0: no EMA, samples use the raw weights")
    return "\n".join(lines)


def describe_memory(parts: dict[str, int]) -> str:
    """A line with the sum of `functions.training.memory.training_memory`, and a line with what it is made of."""
    made_of = ", ".join(f"{name} {count / 1e9:.2f}" for name, count in parts.items() if count)
    return f"  memory     about {sum(parts.values()) / 1e9:.1f} GB at its peak ({made_of} GB)"
