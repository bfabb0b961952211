"""Find the model that enlarges samples (functions/enlarging.py)."""

from dataclasses import replace
from pathlib import Path

from functions.sampling.generation import ImageSampler
from functions.sampling.options import SamplerOptions
from functions.saved.loading import open_model
from functions.support.errors import UserError
from functions.support.processes import SINGLE_PROCESS, Processes


def enlarged(
    image_sampler: ImageSampler, path: Path, processes: Processes = SINGLE_PROCESS
) -> ImageSampler:
    """Return the sampler with the model at `path`, which draws each image at twice its size.

    It computes in the precision of the sampler's own model. Raises UserError for a model of another
    size.
    """
    saved, denoiser = open_model(path, image_sampler.device, "float32", processes)
    denoiser = replace(denoiser, precision=image_sampler.precision)
    processes.print_main(f"enlarged by {saved.path}: {saved}")
    channels, height, width = image_sampler.shape
    shape = (channels, 2 * height, 2 * width)
    if saved.model.image_shape != shape:
        raise UserError(
            f"{saved.path} draws images of {saved.model.image_shape} (channels, height, width); to "
            f"enlarge those of {image_sampler.shape}, it must draw {shape}"
        )

    clip_x_0 = saved.config["diffusion"].get("clip_x_0", True)
    options = SamplerOptions("dpm++", clip_x_0=clip_x_0)
    return replace(
        image_sampler,
        enlarger=replace(image_sampler, denoiser=denoiser, options=options, shape=shape),
        # Manifests and names of folders contain it, as that of a guide.
        options=replace(image_sampler.options, enlarger_digest=saved.digest[:16]),
    )
