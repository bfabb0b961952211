"""Open the run that the flags of train.py ask for: a new one, or one to resume."""

import argparse
from pathlib import Path

import torch

from config import DEFAULT_EXPERIMENT, EXPERIMENTS, DiffusionConfig, Experiment
from functions.saved.checkpoint import SavedModel, open_checkpoint
from functions.saved.loading import open_model
from functions.saved.run_folder import checkpoint_to_resume
from functions.support.command_line import given_fields
from functions.support.processes import Processes
from functions.support.settings import ConfigError, marked
from functions.training.run import TrainingRun


def open_run(args: argparse.Namespace, device: torch.device, processes: Processes) -> TrainingRun:
    """Return the run that the flags of train.py ask for: a new one, or one to resume."""
    name = args.experiment or DEFAULT_EXPERIMENT
    path = processes.on_main(lambda: checkpoint_to_resume(args.resume, args.runs, name))
    if path:
        return resume_run(path, args, device, processes)
    diffusion = given_fields(args, "diffusion")
    model = given_fields(args, "model")
    if args.init:
        initial, _ = open_model(args.init, torch.device("cpu"), processes=processes)
        experiment = fit_to_weights(EXPERIMENTS[name], initial, diffusion, model)
    else:
        experiment = EXPERIMENTS[name].override(diffusion, model)
    run = TrainingRun(name, experiment, args.runs, device, processes)
    if args.init:
        run.begin_with(initial)
    return run


def fit_to_weights(
    preset: Experiment, initial: SavedModel, diffusion: dict, model: dict
) -> Experiment:
    """Return the preset with the values that the weights need, and with the given fields changed.

    Weights work only with the values of some fields of DiffusionConfig, and of all fields of
    ModelConfig except dropout and the size of images, with which they were trained. The size is
    that of their training, too, unless another one is given. Raises ConfigError for a given value
    that does not fit.
    """
    # A diffusers folder has no values for some fields, which then have their defaults.
    saved_fields = vars(DiffusionConfig) | initial.config["diffusion"]
    needed_diffusion = {name: saved_fields[name] for name in marked(DiffusionConfig, "of_weights")}
    needed_model = vars(initial.model) | {"dropout": model.get("dropout", preset.model.dropout)}
    # Convolutions and attention work at any size that the levels can halve.
    size = model.get("image_size", initial.model.image_size)
    halvings = len(initial.model.dim_multiply) - 1
    needed_model |= {"image_size": size, "lowest_resolution_size": size // 2**halvings}
    experiment = preset.override(diffusion | needed_diffusion, needed_model)
    asked = experiment.override(diffusion, model)
    for field, (needed, given) in experiment.differences(asked).items():
        raise ConfigError(
            f"{field} is {needed} for the weights of {initial.path}; "
            f"it cannot be changed to {given}"
        )
    return experiment


def resume_run(
    path: Path, args: argparse.Namespace, device: torch.device, processes: Processes
) -> TrainingRun:
    """Open a run to continue from a checkpoint.

    The experiment comes from the checkpoint, even if config.py has changed. Raises ConfigError for
    changes that a resumed run cannot make, and for a run of another experiment than the flags name.
    """
    folder = path.parents[1]
    checkpoint = open_checkpoint(path)
    name = checkpoint.contents["run"]["experiment"]
    if args.experiment not in (None, name):
        raise ConfigError(f"{folder} is a run of {name!r}, not of {args.experiment!r}")
    saved = Experiment.from_dict(checkpoint.contents["config"])
    resumed = saved.resumed(given_fields(args, "diffusion"), given_fields(args, "model"))
    for field, (earlier, now) in saved.differences(resumed).items():
        processes.print_main(f"changed: {field} was {earlier}, is now {now}")
    # There may be no preset of that name any more.
    preset = EXPERIMENTS.get(name, resumed)
    others = [
        f"{field.partition('.')[2]} ({other}, the run {own})"
        for field, (own, other) in resumed.differences(preset).items()
    ]
    if others:
        processes.print_main(
            f"the run keeps its own settings; {name} in config.py has another {', '.join(others)}"
        )
    return TrainingRun(name, resumed, folder.parent, device, processes, checkpoint)
