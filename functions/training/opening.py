"""Open the run that the flags of train.py ask for: a new one, or one to resume."""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from config import (
    DEFAULT_EXPERIMENT,
    EXPERIMENTS,
    ConfigError,
    DiffusionConfig,
    Experiment,
    ModelConfig,
    OwnNetwork,
    build_network,
)
from data.datasets import load_images
from functions.saved.checkpoint import Checkpoint, SavedModel
from functions.saved.loading import open_model
from functions.saved.run_folder import intact_checkpoint, locked, resume_command, run_to_resume
from functions.support import processes
from functions.support.command_line import given_fields
from functions.support.device import choose_device
from functions.support.errors import UserError, printable
from functions.support.settings import fields_with
from functions.training.run import TrainingRun
from functions.training.stopping import explain_failed_writes


@contextmanager
def open_run(args: Namespace) -> Iterator[TrainingRun]:
    """Open the run that the flags of train.py ask for: a new one, or one to resume.

    A run to resume is locked within the context, except for a dry run, and its checkpoint is read
    under the lock: no other process can have trained it further in between.
    """
    device = choose_device(args.device)
    name = args.experiment or DEFAULT_EXPERIMENT
    if args.runs.is_file():
        raise UserError(f"--runs: {args.runs} is a file, and no folder")
    folder = processes.on_main(run_to_resume, args.resume, args.runs, name)
    with ExitStack() as stack:
        if folder and not args.dry_run:
            with explain_failed_writes(folder, resume_command(folder)):
                processes.on_main(stack.enter_context, locked(folder))
        yield resume_run(folder, args, device) if folder else new_run(name, args, device)


def new_run(name: str, args: Namespace, device: torch.device) -> TrainingRun:
    """Return a new run, which begins with random weights or with those of --init."""
    given = given_fields(args, DiffusionConfig, ModelConfig)
    experiment = EXPERIMENTS[name]
    if args.init:
        initial, _ = open_model(args.init, torch.device("cpu"))
        experiment = fit_to_weights(experiment, initial, given)
    else:
        experiment = experiment.override(**given)
    run = make_run(name, experiment, args.runs, device)
    if args.init:
        run.begin_with(initial)
    return run


def make_run(
    name: str,
    experiment: Experiment,
    runs: Path,
    device: torch.device,
    checkpoint: Checkpoint | None = None,
) -> TrainingRun:
    """Return a run with the images that its config names, and the network that it describes."""
    config, model = experiment.diffusion, experiment.model
    if config.labels and not isinstance(model, ModelConfig):
        raise ConfigError("a network of diffusers gets no label here")
    image_set = load_images(
        config.dataset_name,
        model.image_size,
        config.max_bad_images,
        model.channels,
        config.labels,
    )
    if isinstance(model, ModelConfig):
        experiment = experiment.override(label_count=len(image_set.label_names))
    # This seed is for the initial weights. Every later draw has another seed.
    torch.manual_seed(config.seed)
    network = build_network(experiment.model, config.objective)
    return TrainingRun(name, experiment, image_set, network, runs, device, checkpoint)


def fit_to_weights(preset: Experiment, initial: SavedModel, given: dict) -> Experiment:
    """Return the preset with the network and the schedule of the weights, and the given fields.

    Of our network the dropout is the preset's, and the data decide the number of labels. Raises
    ConfigError for a given value that is not that of the weights.
    """
    # A diffusers folder has no values for some fields, which then have their defaults.
    saved = vars(DiffusionConfig) | initial.config["diffusion"]
    needed = {name: saved[name] for name in fields_with(DiffusionConfig, "fixed_by_weights")}
    is_ours = isinstance(initial.model, ModelConfig)
    if is_ours:
        free = "dropout", "label_count"
        needed |= {name: own for name, own in vars(initial.model).items() if name not in free}
    else:
        preset = replace(preset, model=initial.model)
        needed["image_size"] = initial.model.image_size
    for name in given.keys() & needed.keys():
        if given[name] != needed[name]:
            raise ConfigError(
                f"{name} is {printable(needed[name])} for the weights of {initial.path}; it cannot "
                f"be changed to {printable(given[name])}"
            )
    changes = given | needed
    if not is_ours:
        # It follows from the network's own field.
        del changes["image_size"]
    return preset.override(**changes)


def resume_run(folder: Path, args: Namespace, device: torch.device) -> TrainingRun:
    """Return a run that continues from the newest intact checkpoint, with the config in that.

    Raises ConfigError for changes that a resumed run cannot make, and for another experiment.
    """
    checkpoint = Checkpoint(processes.on_main(lambda: intact_checkpoint(folder).path))
    name = checkpoint.contents["run"]["experiment"]
    if args.experiment not in (None, name):
        raise ConfigError(f"{folder} is a run of {name!r}, not of {args.experiment!r}")
    saved = Experiment.from_dict(checkpoint.contents["config"])
    if isinstance(saved.model, OwnNetwork):
        # It is refused here, because its images have no name that could be found, either.
        build_network(saved.model)
    experiment = saved.override(**given_fields(args, DiffusionConfig, ModelConfig))
    # `TrainingRun` checks this, too, but images of another size would be prepared before.
    saved.check_resumption(experiment)
    return make_run(name, experiment, folder.parent, device, checkpoint)
