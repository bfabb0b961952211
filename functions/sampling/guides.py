"""Find the guide of a model, and guide the model by it (functions/guidance.py)."""

from dataclasses import replace
from pathlib import Path

import torch

from functions.guidance import Guided
from functions.sampling.generation import ImageSampler
from functions.saved.checkpoint import SavedModel
from functions.saved.loading import open_model
from functions.saved.run_folder import checkpoints_of, step_of
from functions.support.errors import UserError
from functions.support.processes import Processes


def corrected(image_sampler: ImageSampler, saved: SavedModel, processes: Processes) -> ImageSampler:
    """Return the sampler with the guide that its options name, if any.

    `saved` is the sampler's model. The guide computes in the model's precision. Raises UserError
    for a guide with another noise schedule or another shape of images, and when `find_guide` finds
    none.
    """
    options = image_sampler.options
    if not options.guide:
        return image_sampler
    # The guide keeps its own objective, and its network may have another size.
    model = image_sampler.denoiser
    path = processes.on_main(lambda: find_guide(options.guide, saved))
    saved_guide, guide = open_model(path, image_sampler.device, "float32", processes)
    guide = replace(guide, precision=image_sampler.precision)
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

    `guide` is that path, or a step of the run that `saved` is from. For a step, it is the path of
    the nearest snapshot or checkpoint among those from before `saved`; or that of the only guide of
    an exported file, which is beside it. Raises UserError when there is none.
    """
    if not guide.isdecimal():
        return Path(guide)
    if guide_beside(saved.path).is_file():
        return guide_beside(saved.path)
    # Checkpoints are at RUN/checkpoints/FILE, and snapshots at RUN/snapshots/FILE.
    run = saved.path.absolute().parent.parent
    # Of several equally near files `min` returns the first. The snapshots are listed first, because
    # the run may later delete a checkpoint.
    files = [*checkpoints_of(run, "snapshots"), *checkpoints_of(run)]
    earlier = [file for file in files if step_of(file) < saved.provenance["step"]]
    if not earlier:
        raise UserError(
            f"{saved.path} has no earlier snapshots in its run for --guide {guide}, and there is "
            f"no {guide_beside(saved.path).name} beside it; name a model, or train with "
            "--diffusion.snapshot-every"
        )
    return min(earlier, key=lambda file: abs(step_of(file) - int(guide)))


def guide_beside(model: Path) -> Path:
    """Return where the guide of an exported NAME.safetensors is: NAME-guide.safetensors beside it.

    Nothing may be there.
    """
    return model.parent / f"{model.stem}-guide{model.suffix}"
