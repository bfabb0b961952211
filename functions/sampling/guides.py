"""Find the guide of a model, and guide the model by it (functions/guidance.py)."""

from dataclasses import replace
from pathlib import Path

import torch

from config import DiffusionConfig
from functions.guidance import Guided
from functions.sampling.generation import ImageSampler
from functions.saved.checkpoint import SavedModel, open_checkpoint
from functions.saved.loading import open_model
from functions.saved.run_folder import checkpoints_of, step_of
from functions.support import processes
from functions.support.errors import UserError
from functions.support.settings import fields_with


def guided(image_sampler: ImageSampler) -> ImageSampler:
    """Return the sampler with the guide that its options name, if any.

    The guide computes in the model's precision. Raises UserError for a guide with another noise
    schedule or another shape of images, and when `find_guide` finds none.
    """
    options = image_sampler.options
    if options.guide is None:
        return image_sampler
    # The guide keeps its own objective, and its network may have another size.
    model = image_sampler.denoiser
    saved = image_sampler.saved
    path = processes.on_main(find_guide, options.guide, saved)
    saved_guide, guide = open_model(path, image_sampler.device, image_sampler.precision)
    processes.print_main(f"guide {saved_guide.path}: {saved_guide}")
    # Both networks get the same x_t and t, so t must mean the same amount of noise to both.
    same_shape = saved_guide.model.image_shape == image_sampler.shape
    alphas_cumprod = model.scheduler.alphas_cumprod
    if not same_shape or not torch.equal(guide.scheduler.alphas_cumprod, alphas_cumprod):
        raise UserError(
            f"{saved_guide.path} cannot guide {saved.path}: it has another shape of images, or "
            "another noise schedule (the number of timesteps, or the betas)"
        )

    return replace(
        image_sampler,
        denoiser=Guided(model, guide, options.guide_weight),
        # Manifests and the names of folders contain its first 16 digits, so that images of one
        # guide are never taken for images of another guide, or of none.
        options=replace(options, guide_digest=saved_guide.digest[:16]),
    )


def find_guide(guide: str, saved: SavedModel) -> Path:
    """Return the path of the guide of `saved`.

    `guide` is that path, or a step: then it is the nearest of the earlier snapshots and checkpoints
    of the model's run, or the guide beside an exported file, which must be of this step. Raises
    UserError when there is none.
    """
    if not guide:
        raise UserError('--guide "" names neither a step nor a model')
    if not guide.isdecimal():
        return Path(guide)
    beside = guide_beside(saved.path)
    if beside.is_file():
        step = open_checkpoint(beside).contents["run"]["step"]
        if step != int(guide):
            raise UserError(f"{beside} is of step {step}: use --guide {step}")
        return beside
    folder = saved.path.absolute().parent
    files = []
    # A file that is elsewhere in a run's folder may come from another run.
    if folder.name in ("checkpoints", "snapshots"):
        # Of several equally near files `min` returns the first. The snapshots are listed first,
        # because the run may later delete a checkpoint.
        files = [*checkpoints_of(folder.parent, "snapshots"), *checkpoints_of(folder.parent)]
    earlier = [file for file in files if step_of(file) < saved.provenance["step"]]
    nearest = min(earlier, key=lambda file: abs(step_of(file) - int(guide)), default=None)
    if not nearest or not of_one_run(saved.config, open_checkpoint(nearest).contents["config"]):
        raise UserError(
            f"{saved.path} has no earlier snapshots in its run for --guide {guide}, and there is "
            f"no {beside.name} beside it; name a model, or train with --diffusion.snapshot-every"
        )
    return nearest


def of_one_run(config: dict, other: dict) -> bool:
    """Return whether two configs are equal but for what a resumed run can change."""
    may_change = {"batch_size", "gradient_accumulation"}
    may_change |= fields_with(DiffusionConfig, "changeable")
    # Another version may have written one of them, with fewer or more fields.
    values = {**other["diffusion"], **other["model"]}
    fields = {**config["diffusion"], **config["model"]}.items()
    return all(values.get(name, value) == value for name, value in fields if name not in may_change)


def guide_beside(model: Path) -> Path:
    """Return where the guide of an exported NAME.safetensors is, if it has one."""
    return model.parent / f"{model.stem}-guide{model.suffix}"
