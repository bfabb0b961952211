"""Load what draws together: a model, its guide, and the models that enlarge its images."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from inspect import Parameter
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from functions.denoiser import Predictor, inputs_of, no_inputs_of
from functions.sampling.settings import SamplingConfig
from functions.saved.checkpoint import SavedModel
from functions.saved.loading import open_model
from functions.saved.run_folder import checkpoints_of, step_of
from functions.support import processes
from functions.support.device import choose_device, set_deterministic
from functions.support.errors import UserError, printable

# The role of a model that enlarges
ENLARGES = "enlarged by "


@dataclass(frozen=True)
class Models:
    """A model that was loaded, with its guide and its enlargers, which have none themselves."""

    denoiser: Predictor
    shape: tuple[int, int, int]  # (C, H, W)
    device: torch.device
    # The precision of all networks, by its name.
    precision: str = "float32"
    # False for a few models from diffusers folders.
    clip_x_0: bool = True
    # Each of them doubles the size of the images (functions/super_resolution/enlarging.py).
    enlargers: tuple["Models", ...] = ()
    guide: "Models | None" = None
    label_names: Sequence[str] = ()
    # What the networks are given beside labels, (N, ...) each, by name
    inputs: dict[str, Tensor] = field(default_factory=dict)
    # Where the denoiser comes from
    saved: SavedModel | None = None

    @property
    def enlarged_shape(self) -> tuple[int, int, int]:
        """The shape of the images that all enlargers have enlarged."""
        return [self, *self.enlargers][-1].shape


def open_models(config: SamplingConfig, device_name: str) -> Models:
    """Load the model of the settings, its guide and its enlargers; print what they are.

    Of a run, the newest intact checkpoint is loaded. Guide and enlargers have the precision of the
    model. Raises UserError for models that do not fit the machine, the settings or each other, and
    CheckpointError when there is none.
    """
    device = choose_device(device_name)
    set_deterministic(False)
    models = opened(Path(config.model), device, config.precision)
    # This raises errors about labels before other models are loaded.
    chosen_labels(config.label, models.label_names, [])
    always_labelled = models.saved.config["diffusion"].get("condition_dropout") == 0
    if models.label_names and always_labelled and (config.cfg is not None or not config.label):
        raise UserError(
            f"{models.saved.path} never saw an image without its label (condition_dropout 0), so "
            f"it needs a --label, without --cfg: {printable(', '.join(models.label_names))}"
        )
    models = replace(models, inputs=read_inputs(config, models))
    if config.guide is not None:
        models = guided(models, config)
    for path in config.enlarge:
        models = enlarged(models, Path(path))
    return models


def read_inputs(config: SamplingConfig, models: Models) -> dict[str, Tensor]:
    """Return the arrays of the settings' inputs, on the device, with the dtypes of the training's.

    Raises UserError unless they are of those that the network was trained with, in name and shape,
    and for what is missing that the network cannot do without.
    """
    saved, network = models.saved, models.denoiser.network
    known = saved.provenance.get("inputs", {})
    shapes = ", ".join(f"{name} {('N', *shape)}" for name, (shape, _) in known.items())
    takes = f"{saved.path} takes {printable(shapes).replace(chr(39), '') or 'none'}"
    needed = {name for name in known if inputs_of(network)[name].default is Parameter.empty}
    if config.inputs is None:
        if needed:
            raise UserError(f"--inputs: it is needed; {takes}")
        return {}
    try:
        with np.load(config.inputs) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, EOFError, BadZipFile, AttributeError) as error:
        raise UserError(f"--inputs: {config.inputs} is no .npz file of numbers") from error
    fits = (
        arrays
        and needed <= arrays.keys() <= known.keys()
        and all(
            values.ndim
            and len(values)
            and [*values.shape[1:]] == known[name][0]
            and np.can_cast(values.dtype, known[name][1], "same_kind")
            for name, values in arrays.items()
        )
    )
    if not fits:
        found = ", ".join(f"{name} {values.shape}" for name, values in arrays.items())
        raise UserError(f"--inputs: {config.inputs} has {printable(found) or 'none'}; {takes}")
    never = known.keys() - no_inputs_of(network).keys()
    if config.cfg is not None and never:
        raise UserError(f"--cfg: {saved.path} never saw an image without {', '.join(never)}")
    return {
        name: torch.from_numpy(values.astype(known[name][1])).to(models.device)
        for name, values in arrays.items()
    }


def opened(path: Path, device: torch.device, precision: str, role: str = "") -> Models:
    """Load one model, and print what it is, after its role.

    Raises UserError for a model of details that is to draw alone, and for another that is to
    enlarge.
    """
    saved, denoiser = open_model(path, device, precision)
    draws_details = "low" in inputs_of(denoiser.network)
    if draws_details and role != ENLARGES:
        raise UserError(
            f"{saved.path} draws the details of an image that it is given, and nothing alone: use "
            "it with --enlarge, or with edit.py enlarge"
        )
    if role == ENLARGES and not draws_details:
        raise UserError(
            f"{saved.path} cannot enlarge: it was not trained to draw details, as the preset "
            "ffhq-details is"
        )
    processes.print_main(f"{role}{saved.path}: {saved}")
    return Models(
        denoiser,
        saved.model.image_shape,
        device,
        str(denoiser.precision).removeprefix("torch."),
        saved.config["diffusion"].get("clip_x_0", True),
        label_names=saved.label_names,
        saved=saved,
    )


def guided(models: Models, config: SamplingConfig) -> Models:
    """Return the models with the guide that the settings name (functions/guidance.py).

    Raises UserError for a guide with another noise schedule, shape of images or labels.
    """
    # The guide keeps its own objective, and its network may have another size.
    path = processes.on_main(guide_path, config.guide, models.saved)
    guide = opened(path, models.device, models.precision, "guide ")
    refusal = f"{guide.saved.path} cannot guide {models.saved.path}"
    if config.label and guide.label_names != models.label_names:
        raise UserError(f"{refusal}: other labels")
    if models.inputs and guide.saved.provenance.get("inputs") != models.saved.provenance["inputs"]:
        raise UserError(f"{refusal}: other inputs")
    # Both networks get the same x_t and t, so t must mean the same amount of noise to both.
    # Files of diffusers have betas in float32.
    schedules = [each.denoiser.scheduler.alphas_cumprod for each in (models, guide)]
    is_same = schedules[0].shape == schedules[1].shape and torch.allclose(*schedules, rtol=1e-3)
    if guide.shape != models.shape or not is_same:
        raise UserError(
            f"{refusal}: it has another shape of images, or another noise schedule (the number of "
            "timesteps, or the betas)"
        )
    return replace(models, guide=guide)


def run_of(path: Path) -> Path | None:
    """Return the run of a checkpoint or a snapshot, or None for what is in no run."""
    folder = path.absolute().parent
    return folder.parent if folder.name in ("checkpoints", "snapshots") and path.is_file() else None


def guide_path(guide: int | str, saved: SavedModel) -> Path:
    """Return the path of a guide: a path itself, or a step of the run of `saved`.

    A snapshot comes before a checkpoint, which the run may later delete. Raises UserError when the
    run has neither of this step.
    """
    if isinstance(guide, str):
        return Path(guide)
    run = run_of(saved.path)
    files = [*checkpoints_of(run), *checkpoints_of(run, "snapshots")] if run else []
    by_step = {step_of(file): file for file in files}
    if guide in by_step:
        return by_step[guide]
    steps = ", ".join(map(str, sorted(by_step)))
    there = f"its run has those of steps {steps}" if run else "it is in no run"
    raise UserError(
        f"--guide {guide}: {saved.path} has no snapshot or checkpoint of step {guide} beside it "
        f"({there}); name one of these, or the file of a model"
    )


def enlarged(models: Models, path: Path) -> Models:
    """Return the models with one more, at `path`, which doubles the size of images.

    That model has its own schedule, and the precision of the first one. Raises UserError for a
    model of other images, and CheckpointError when there is none.
    """
    enlarger = opened(path, models.device, models.precision, ENLARGES)
    channels, height, width = models.enlarged_shape
    if enlarger.shape[0] != channels:
        raise UserError(
            f"{enlarger.saved.path} enlarges images of {enlarger.shape[0]} channels, and these "
            f"samples have {channels}"
        )
    enlarger = replace(enlarger, shape=(channels, 2 * height, 2 * width))
    return replace(models, enlargers=(*models.enlargers, enlarger))


def chosen_labels(chosen: Sequence[str], names: Sequence[str], indices: Sequence[int]) -> Tensor:
    """Return the labels (B,) of the images with these B indices: i has chosen[i mod K].

    Raises UserError for one of the K chosen names that is not among those of the model.
    """
    if chosen and not names:
        raise UserError("--label: the model was trained without labels")
    for name in chosen:
        if name not in names:
            known = printable(", ".join(names))
            raise UserError(f"--label: the model knows {known}, and not {printable(name)!r}")
    return torch.tensor([names.index(chosen[i % len(chosen)]) for i in indices])
