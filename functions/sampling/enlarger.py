"""Find the model that enlarges samples (functions/enlarging.py)."""

from dataclasses import replace
from pathlib import Path

from functions.enlarging import Enlarger
from functions.sampling.generation import ImageSampler
from functions.saved.loading import open_model
from functions.support.errors import UserError
from functions.support.processes import SINGLE_PROCESS, Processes


def enlarged(
    image_sampler: ImageSampler, path: Path, processes: Processes = SINGLE_PROCESS
) -> ImageSampler:
    """Return the sampler with the model at `path`, which draws each image at twice its size.

    That model has its own schedule, and the precision of the sampler's. Raises UserError for a
    model of another size, and CheckpointError when there is none.
    """
    saved, denoiser = open_model(path, image_sampler.device, "float32", processes)
    processes.print_main(f"enlarged by {saved.path}: {saved}")
    if saved.model.image_shape != image_sampler.large_shape:
        raise UserError(
            f"{saved.path} draws images of {saved.model.image_shape} (channels, height, width); "
            f"to enlarge these samples it must draw {image_sampler.large_shape}"
        )
    denoiser = replace(denoiser, precision=image_sampler.precision)
    return replace(
        image_sampler,
        enlarger=Enlarger(denoiser),
        # Manifests and names of folders contain it, as that of a guide.
        options=replace(image_sampler.options, enlarger_digest=saved.digest[:16]),
    )
