"""What is said of a run, to files and reader, and how a resumption is refused."""

import math
from collections.abc import Iterator

from config import DiffusionConfig, Experiment
from functions.denoiser import Denoiser
from functions.noise_scheduler import build_scheduler
from functions.optimizers import rate_of
from functions.saved.checkpoint import Checkpoint
from functions.support import processes
from functions.support.device import arithmetic
from functions.support.errors import quoted
from functions.support.settings import ConfigError, fields_with
from functions.training.data import TrainingData

# With a terminal SNR above this, x_T still shows the image. In the paper's 1000 steps it is 4e-5.
VISIBLE_SNR = 1e-3


def provenance_of(
    data: TrainingData, denoiser: Denoiser, compiled: bool, initial: str | None
) -> dict:
    """Return plain values for config.json and checkpoints: hashes of the images, ..."""
    return {
        "split_rule": data.split.rule,
        **data.split.hashes,
        "label_names": data.image_set.label_names,
        "parameters": sum(p.numel() for p in denoiser.network.parameters()),
        # This describes the model whose weights the run started from. None: random weights.
        "initial": initial,
        # The shape and the dtype of what it is given with each image, but for its label.
        "inputs": {
            name: [list(values.shape[1:]), str(values.dtype)]
            for name, values in data.image_set.inputs.items()
            if name != "label"
        },
        # The bits of the results depend on these values.
        "arithmetic": {
            **arithmetic(data.device, denoiser.precision),
            "processes": processes.count(),
            "batch_size": data.config.batch_size,
            # Compiled dropout draws other random numbers.
            "compiled": compiled,
        },
    }


def check_resumption(earlier: Checkpoint, experiment: Experiment, data: TrainingData) -> None:
    """Raise ConfigError if images, labels or fields are not the run's, or no step is left."""
    config = experiment.diffusion
    facts = earlier.contents["run"]
    # A checkpoint is at RUN/checkpoints/FILE.
    folder = earlier.path.parents[1]
    for what in data.split.differences(facts):
        rules = facts.get("split_rule", ""), data.split.rule
        reason = " (held out then: {}; now: {})".format(*rules) if len({*rules}) > 1 else ""
        raise ConfigError(
            f"{folder} was {what} than {config.dataset_name} has{reason}; it cannot continue with "
            "these"
        )
    check_changes(Experiment.from_dict(earlier.contents["config"]), experiment)
    step = facts["step"]
    if step >= data.total_steps:
        steps = data.steps_per_epoch
        raise ConfigError(
            f"the run is finished with {config.epochs} epochs of {steps:,} steps, as "
            f"{step:,} steps are done; to train it longer: --resume {quoted(folder)} "
            f"--diffusion.epochs {step // steps + 1}"
        )


def check_changes(before: Experiment, after: Experiment) -> None:
    """Raise ConfigError, with the names of the fields, for what a resumed run cannot change.

    Those are the network, and the fields of DiffusionConfig that are `fixed`.
    """
    marks = "fixed", "fixed_by_weights"
    fixed = {f"diffusion.{name}" for mark in marks for name in fields_with(DiffusionConfig, mark)}
    # There is an average of the weights from the first step on, or never.
    if 0 in (before.diffusion.ema_decay, after.diffusion.ema_decay):
        fixed.add("diffusion.ema_decay")
    differing = before.differences(after)
    if wrong := [name for name in differing if name in fixed or name.startswith("model.")]:
        raise ConfigError(
            f"a resumed run cannot change {', '.join(sorted(wrong))}; start a new run for that"
        )
    own = before.diffusion.effective_batch
    if after.diffusion.effective_batch != own:
        raise ConfigError(
            f"a resumed run keeps its effective batch (batch_size x gradient_accumulation) of {own}"
        )


def describe(
    name: str,
    experiment: Experiment,
    data: TrainingData,
    provenance: dict,
    earlier: Checkpoint | None,
) -> str:
    """Describe a run in a few lines (data, split, network, ...), followed by warnings.

    `earlier` is the checkpoint from which it goes on, if it is resumed.
    """
    config = experiment.diffusion
    shift = config.log_snr_shift
    shifted = f", log-SNR shifted by {shift:g}" if shift else ""
    betas = "its own" if config.betas else config.beta_schedule
    numbers = provenance["arithmetic"]
    compiled = ", compiled in the first step, for minutes" if numbers["compiled"] else ""
    done = f"; {earlier.contents['run']['step']:,} steps are done" if earlier else ""
    snr = build_scheduler(vars(config)).terminal_snr
    lines = [
        name,
        f"  data       {data.image_set.summary}",
        f"  split      {data.split.description}",
        f"  network    {provenance['parameters']:,} parameters, {numbers['precision']}, "
        f"{data.device}{compiled}",
        f"  length     {data.total_steps:,} steps of {config.effective_batch} images: "
        f"{config.epochs} epochs of {data.steps_per_epoch:,} steps{done}",
        f"  objective  {config.objective} over {config.timesteps_diff} timesteps with "
        f"{betas} betas{shifted}, terminal SNR {snr:.2g}",
    ]
    if provenance["initial"]:
        lines.append(f"  begins as  {provenance['initial']}")
    lines += [f"warning: {warning}" for warning in warnings(experiment, data.total_steps, snr)]
    if earlier:
        lines += describe_changes(earlier.contents, experiment, data, provenance)
    return "\n".join(lines)


def warnings(experiment: Experiment, total_steps: int, terminal_snr: float) -> Iterator[str]:
    """Yield a warning for each setting that is allowed but probably not meant."""
    config = experiment.diffusion
    if experiment.model.network in ("unet", "details"):
        groups = experiment.model.norm_groups
        channels_of_group = min(experiment.model.dims) / groups
        if channels_of_group < 4:
            yield (
                f"norm_groups = {groups} leaves {channels_of_group:g} of the 4 channels that a "
                "group needs at the narrowest level; samples may come out tinted "
                "(docs/what-did-not-help.md)"
            )
    # Betas of one's own are those of the weights.
    if terminal_snr > VISIBLE_SNR and not config.betas:
        signal = math.sqrt(terminal_snr / (1 + terminal_snr))
        yield (
            f"terminal SNR {terminal_snr:.2g} (sqrt(alpha_bar_T) = {signal:.3f}): "
            "x_T still carries the image, but sampling starts from pure noise; set "
            f"rescale_betas = True and beta_end = {DiffusionConfig.beta_end}"
        )
    if config.warmup_steps >= total_steps:
        yield (
            f"warmup_steps = {config.warmup_steps:,} and the run has {total_steps:,} steps: "
            "its learning rate never reaches learning_rate"
        )


def describe_changes(
    earlier: dict, experiment: Experiment, data: TrainingData, provenance: dict
) -> Iterator[str]:
    """Yield a line for each change of a resumed run, given the contents of its checkpoint."""
    config = experiment.diffusion
    facts = earlier["run"]
    before = Experiment.from_dict(earlier["config"])
    for field, (value, now) in before.differences(experiment).items():
        yield f"changed: {field} was {value}, is now {now}"
    # More epochs move a step back on its schedule.
    step, earlier_steps = facts["step"], facts["total_steps"]
    last_rate = rate_of(before.diffusion, step - 1, earlier_steps)
    rate = rate_of(config, step, data.total_steps)
    if rate > 2 * last_rate:
        yield (
            f"warning: the learning rate was {last_rate:.3g} in the last step, of a run of "
            f"{earlier_steps:,}, and is {rate:.3g} in the next, of a run of {data.total_steps:,}"
        )
    # A resumed run equals an uninterrupted one bit for bit only in the same arithmetic.
    for name, value in facts.get("arithmetic", {}).items():
        now = provenance["arithmetic"].get(name)
        if value != now:
            yield (
                f"warning: {name} was {value}, is now {now}: no longer bit for bit like an "
                "uninterrupted run"
            )
