"""Guide a model by a worse one, such as itself from earlier in its training.

The x_0 of the model is moved away from that of the guide:

    x_0 = x_0(guide) + w (x_0(model) - x_0(guide))

With w = 1 this is the model. With w > 1 it corrects what the guide does worse, further than the
model does. This is autoguidance (Karras et al. 2024, arXiv:2406.02507), here for models without
labels, whose own snapshots are good guides: docs/better-than-the-model.md.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from functions.sampling.calibration import with_calibration
from functions.sampling.generation import ImageSampler, limit_batch, load_intact, rebuild
from functions.support.checkpoint import SavedModel
from functions.support.errors import UserError
from functions.support.processes import Processes
from functions.support.run_folder import checkpoints_of, find_checkpoints, step_of


def with_guide(
    image_sampler: ImageSampler, saved: SavedModel, processes: Processes
) -> ImageSampler:
    """Return the sampler with the guide that its options name, if they name one.

    The guide has the precision of the model, and a calibration of its own if the model has one.
    Raises UserError for a guide with another noise schedule or another shape of images.
    """
    options = image_sampler.options
    if not options.guide:
        return image_sampler
    saved_guide = load_intact(lambda: find_guide(options.guide, saved), processes)
    processes.print_main(f"guide {saved_guide.path}: {saved_guide}; two network calls per step")

    model = image_sampler.denoiser
    guide = rebuild(saved_guide, image_sampler.device, model.precision)
    shape = saved_guide.model.image_shape
    if shape != image_sampler.shape:
        raise UserError(
            f"{saved_guide.path} cannot guide {saved.path}: its images are {shape}, and the "
            f"model's are {image_sampler.shape}"
        )
    if not torch.equal(guide.scheduler.alphas_cumprod, model.scheduler.alphas_cumprod):
        raise UserError(
            f"{saved_guide.path} cannot guide {saved.path}: it has another noise schedule "
            "(the number of timesteps, or the betas)"
        )

    guide = limit_batch(guide, shape, image_sampler.device, processes)
    guide_sampler = replace(image_sampler, denoiser=guide)
    guide = with_calibration(guide_sampler, saved_guide, processes).denoiser
    return replace(
        image_sampler,
        denoiser=replace(model, guide=guide, guidance=options.guidance),
        options=replace(options, guide_digest=saved_guide.digest),
    )


def find_guide(guide: str, saved: SavedModel) -> Sequence[Path]:
    """Return the files that `guide` names, in the order in which they are tried.

    It is a path, or a step of the model's run. A step means the nearest snapshot or checkpoint from
    before the model. Raises UserError when the run has none.
    """
    if not re.fullmatch(r"\d{1,8}", guide):
        return find_checkpoints(Path(guide))
    run = saved.path.absolute().parent.parent
    # Checkpoints are deleted later, so a snapshot comes first if both are equally near.
    files = [*checkpoints_of(run, "snapshots"), *checkpoints_of(run)]
    earlier = [file for file in files if step_of(file) < saved.provenance["step"]]
    if not earlier:
        raise UserError(
            f"{saved.path} has no earlier snapshots in its run for --guide {guide}; name a model, "
            "or train with --diffusion.snapshot-every"
        )
    return [min(earlier, key=lambda file: abs(step_of(file) - int(guide)))]
