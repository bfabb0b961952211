"""What is said of a run, to its files and its reader, and how a resumption is refused."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from config import ConfigError, DiffusionConfig
from functions.support import processes
from functions.support.device import arithmetic
from functions.support.errors import quoted

if TYPE_CHECKING:
    from functions.training.run import TrainingRun

# With a terminal SNR above this, x_T still shows the image. In the paper's 1000 steps it is 4e-5.
VISIBLE_SNR = 1e-3


def provenance_of(run: "TrainingRun") -> dict:
    """Return plain values for config.json and checkpoints: hashes of the images, ..."""
    split = run.data.split
    return {
        "split_rule": split.rule,
        **split.hashes,
        "label_names": run.data.image_set.label_names,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        # This describes the model whose weights the run started from. None: random weights.
        "initial": run.earlier_provenance.get("initial"),
        # The bits of the results depend on these values.
        "arithmetic": {
            **arithmetic(run.device, run.denoiser.precision),
            "processes": processes.count(),
            "batch_size": run.config.batch_size,
            # Compiled dropout draws other random numbers.
            "compiled": run.is_to_compile,
        },
    }


def check_resumption(run: "TrainingRun") -> None:
    """Raise ConfigError if images, labels or fields are not the run's, or no step is left."""
    dataset_name = run.config.dataset_name
    split = run.data.split
    for what in split.differences(run.earlier_provenance):
        rules = run.earlier_provenance.get("split_rule", ""), split.rule
        reason = " (held out then: {}; now: {})".format(*rules) if len({*rules}) > 1 else ""
        if "FFHQ" in rules[0] and dataset_name != "FFHQ":
            reason += "; FFHQ is split so only as --diffusion.dataset-name FFHQ"
        raise ConfigError(
            f"{run.folder} was {what} than {dataset_name} has{reason}; it cannot continue with "
            "these"
        )
    run.earlier.check_resumption(run.experiment)
    if run.step >= run.total_steps:
        steps = run.data.steps_per_epoch
        raise ConfigError(
            f"the run is finished with {run.config.epochs} epochs of {steps:,} steps, as "
            f"{run.step:,} steps are done; to train it longer: --resume {quoted(run.folder)} "
            f"--diffusion.epochs {run.step // steps + 1}"
        )


def describe(run: "TrainingRun") -> str:
    """Describe a run in a few lines (data, split, network, ...), followed by warnings."""
    config = run.config
    data = run.data
    facts = run.provenance
    done = f"; {run.step:,} steps are done" if run.step else ""
    shift = config.log_snr_shift
    shifted = f", log-SNR shifted by {shift:g}" if shift else ""
    betas = "its own" if config.betas else config.beta_schedule
    compiled = ", compiled in the first step, for minutes" if run.is_to_compile else ""
    lines = [
        run.name,
        f"  data       {data.image_set.summary}",
        f"  split      {data.split.description}",
        f"  network    {facts['parameters']:,} parameters, {facts['arithmetic']['precision']}, "
        f"{run.device}{compiled}",
        f"  length     {run.total_steps:,} steps of {config.effective_batch} images: "
        f"{config.epochs} epochs of {data.steps_per_epoch:,} steps{done}",
        f"  objective  {config.objective} over {config.timesteps_diff} timesteps with "
        f"{betas} betas{shifted}, terminal SNR {run.denoiser.scheduler.terminal_snr:.2g}",
    ]
    if facts["initial"]:
        lines.append(f"  begins as  {facts['initial']}")
    if run.earlier:
        for field, (earlier, now) in run.earlier.differences(run.experiment).items():
            lines.append(
                f"changed: {field} was {earlier}, is now {now}: from here on it is another run"
            )
    lines += [f"warning: {warning}" for warning in warnings(run)]
    return "\n".join(lines)


def warnings(run: "TrainingRun") -> Iterator[str]:
    """Yield a warning for each setting that is allowed but probably not meant."""
    config = run.config
    steps = run.total_steps
    yield from run.experiment.warnings()
    snr = run.denoiser.scheduler.terminal_snr
    # Betas of one's own are those of the weights.
    if snr > VISIBLE_SNR and not config.betas:
        yield (
            f"terminal SNR {snr:.2g} (sqrt(alpha_bar_T) = {math.sqrt(snr / (1 + snr)):.3f}): "
            "x_T still carries the image, but sampling starts from pure noise; set "
            f"rescale_betas = True and beta_end = {DiffusionConfig.beta_end}"
        )
    if config.warmup_steps >= steps:
        yield (
            f"warmup_steps = {config.warmup_steps:,} and the run has {steps:,} steps: its "
            "learning rate never reaches learning_rate"
        )
    changed = config.condition_dropout != DiffusionConfig.condition_dropout
    if changed and "label" not in run.data.image_set.inputs and config.objective != "details":
        yield "condition_dropout has no effect without labels = True"
    if run.step:
        # More epochs move a step back on its schedule.
        earlier_steps = run.earlier_provenance["total_steps"]
        last_rate = run.earlier.diffusion.rate_of(run.step - 1, earlier_steps)
        rate = config.rate_of(run.step, steps)
        if rate > 2 * last_rate:
            yield (
                f"the learning rate was {last_rate:.3g} in the last step, of a run of "
                f"{earlier_steps:,}, and is {rate:.3g} in the next, of a run of {steps:,}"
            )
    # A resumed run equals an uninterrupted one bit for bit only in the same arithmetic.
    for name, earlier in run.earlier_provenance.get("arithmetic", {}).items():
        now = run.provenance["arithmetic"].get(name)
        if earlier != now:
            yield (
                f"{name} was {earlier}, is now {now}: no longer bit for bit like an "
                "uninterrupted run"
            )
