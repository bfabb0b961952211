"""Open the run that the command line of train.py asks for: a new one, or one to resume."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from config import DEFAULT_EXPERIMENT, EXPERIMENTS, DiffusionConfig, Experiment
from data.datasets import load_images
from functions.denoiser import OBJECTIVES, inputs_of
from functions.noise_scheduler import build_scheduler
from functions.optimizers import LR_SCHEDULES, OPTIMIZERS
from functions.samplers import SAMPLERS
from functions.saved.checkpoint import Checkpoint, load_model
from functions.saved.run_folder import PlaceFlags
from functions.support import processes
from functions.support.command_line import read_flags, split_words
from functions.support.device import choose_device
from functions.support.errors import UserError, printable
from functions.support.settings import ConfigError, fields_with, row_of, setting
from functions.training.description import check_changes
from functions.training.resuming import (
    explain_failed_writes,
    intact_checkpoint,
    locked,
    resume_command,
    run_to_resume,
)
from functions.training.run import TrainingRun
from models.networks import NETWORKS, build_network

# It returns an experiment with the fields that flags replace.
Read = Callable[[Experiment], Experiment]


@dataclass(frozen=True, kw_only=True)
class OpeningFlags(PlaceFlags):
    """The flags that decide with which values all others begin."""

    # Resume the run in this folder. Without a value, resume the newest unfinished run of the
    # experiment; with auto, resume that run, or start a new run if there is none.
    resume: str | bool = False
    # Start from the weights of a run, a checkpoint or a diffusers folder, and from its EMA weights
    # if it has any. A run that --resume auto resumes keeps its own.
    init: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init and self.resume not in (False, "auto"):
            raise ConfigError("--init starts a new run, but --resume continues one")


@dataclass(frozen=True, kw_only=True)
class TrainFlags(OpeningFlags):
    """The flags of train.py."""

    # All settings of the run
    experiment: Experiment = setting(flat=True)


@contextmanager
def open_run(words: Sequence[str], description: str) -> Iterator[TrainingRun]:
    """Open the run of a command line.

    A run to resume is locked within the context, and its checkpoint is read under the lock: no
    other process can have trained it further in between.
    """
    [name], words = split_words("[EXPERIMENT]", words)
    if name not in (None, *EXPERIMENTS):
        raise UserError(f"there is no experiment {name!r}, but {', '.join(EXPERIMENTS)}")
    flags = read_flags(OpeningFlags(), words, is_first_look=True)

    def read(experiment: Experiment) -> Experiment:
        begun = TrainFlags(**vars(flags), experiment=experiment)
        return read_flags(begun, words, "[EXPERIMENT]", description).experiment

    folder = processes.on_main(run_to_resume, flags.resume, flags.runs, name or DEFAULT_EXPERIMENT)
    with ExitStack() as stack:
        if folder:
            with explain_failed_writes(folder, resume_command(folder)):
                processes.on_main(stack.enter_context, locked(folder))
            run = resume_run(folder, name, read, choose_device(flags.device))
        else:
            run = new_run(name or DEFAULT_EXPERIMENT, flags, read)
        yield run


def new_run(name: str, flags: OpeningFlags, read: Read) -> TrainingRun:
    """Return a new run, which begins with random weights or with those of --init.

    With these, network and schedule are those of the weights, but flags can change the size of the
    images; the dropout is the preset's, and the data decide the number of labels. Raises
    ConfigError for flags that change what is the weights'.
    """
    preset = EXPERIMENTS[name]
    device = choose_device(flags.device)
    if not flags.init:
        return make_run(name, read(preset), flags.runs, device)
    initial = load_model(flags.init)
    # A diffusers folder has no values for some fields, which then have their defaults.
    saved = vars(DiffusionConfig) | initial.config["diffusion"]
    fixed = fields_with(DiffusionConfig, "fixed_by_weights")
    model = initial.model
    free = {"dropout"}
    # That of diffusers has its own dropout and size, as all that it is built by.
    if model.network != "diffusers":
        # Other weights fit images of any size that the levels can halve.
        free |= {"image_size", "lowest_resolution_size"}
        model = replace(model, dropout=preset.model.dropout, lowest_resolution_size=None)
    begun = Experiment(replace(preset.diffusion, **{field: saved[field] for field in fixed}), model)
    experiment = read(begun)
    for path, (own, changed) in begun.differences(experiment).items():
        part, field = path.split(".")
        if field in fixed or (part == "model" and field not in free):
            raise ConfigError(
                f"{field} is {printable(own)} for the weights of {initial.path}; it cannot be "
                f"changed to {printable(changed)}"
            )
    run = make_run(name, experiment, flags.runs, device)
    run.begin_with(initial)
    return run


def check_names(config: DiffusionConfig) -> None:
    """Raise ConfigError for a name that is in no table, and for betas that make no schedule."""
    tables = {"objective": OBJECTIVES, "optimizer": OPTIMIZERS, "lr_schedule": LR_SCHEDULES}
    for field, table in (tables | {"grid_sampler": SAMPLERS}).items():
        row_of(table, field, getattr(config, field))
    try:
        build_scheduler(vars(config))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def make_run(
    name: str,
    experiment: Experiment,
    runs: Path,
    device: torch.device,
    checkpoint: Checkpoint | None = None,
) -> TrainingRun:
    """Return a run with the images that its config names, and the network that it describes."""
    config, model = experiment.diffusion, experiment.model
    check_names(config)
    if model.channels not in (1, 3):
        raise ConfigError(f"channels is {model.channels}; image files have 3 or 1")
    # A network without memory for its weights says what it takes, before images are read.
    with torch.device("meta"):
        takes = inputs_of(build_network(model))
    if config.labels and "label" not in takes:
        raise ConfigError(f"the network {model.network!r} takes no label")
    load = partial(
        load_images,
        config.dataset_name,
        model.image_size,
        config.max_bad_images,
        model.channels,
        config.labels,
    )
    if processes.count() > 1:
        # Rank 0 prepares the images, and the others find them prepared.
        processes.on_main(lambda: load().summary)
    image_set = load()
    experiment = experiment.override(label_count=len(image_set.label_names))
    # This seed is for the initial weights. Every later draw has another seed.
    torch.manual_seed(config.seed)
    network = build_network(experiment.model)
    return TrainingRun(name, experiment, image_set, network, runs, device, checkpoint)


def resume_run(folder: Path, name: str | None, read: Read, device: torch.device) -> TrainingRun:
    """Return a run that continues from the newest intact checkpoint, with the config in that.

    Raises ConfigError for changes that a resumed run cannot make, and for another experiment.
    """
    checkpoint = Checkpoint(processes.on_main(lambda: intact_checkpoint(folder).path))
    own_name = checkpoint.contents["run"]["experiment"]
    if name not in (None, own_name):
        raise ConfigError(f"{folder} is a run of {own_name!r}, not of {name!r}")
    saved = Experiment.from_dict(checkpoint.contents["config"])
    if saved.model.network not in NETWORKS:
        # It is refused here, because its images have no name that could be found, either.
        build_network(saved.model)
    experiment = read(saved)
    # `TrainingRun` checks this, too, but images of another size would be prepared before.
    check_changes(saved, experiment)
    return make_run(own_name, experiment, folder.parent, device, checkpoint)
