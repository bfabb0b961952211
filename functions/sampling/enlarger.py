"""Find a model that enlarges samples (functions/enlarging.py)."""

from dataclasses import replace
from pathlib import Path

from functions.sampling.generation import ImageSampler
from functions.saved.loading import open_model
from functions.support import processes
from functions.support.errors import UserError


def enlarged(image_sampler: ImageSampler, path: Path) -> ImageSampler:
    """Return the sampler with one more model, at `path`, which draws images at twice their size.

    That model has its own schedule, and the precision of the sampler's. Raises UserError for a
    model of another size, and CheckpointError when there is none.
    """
    saved, denoiser = open_model(path, image_sampler.device, image_sampler.precision)
    processes.print_main(f"enlarged by {saved.path}: {saved}")
    enlargers = image_sampler.enlargers
    shape = image_sampler.enlarged_shape(len(enlargers) + 1)
    if saved.model.image_shape != shape:
        raise UserError(
            f"{saved.path} draws images of {saved.model.image_shape} (channels, height, width); "
            f"to enlarge these samples it must draw {shape}"
        )
    options = image_sampler.options
    # Manifests and names of folders contain the digests, as that of a guide.
    digests = (*options.enlarger_digests, saved.digest[:16])
    return replace(
        image_sampler,
        enlargers=(*enlargers, denoiser),
        options=replace(options, enlarger_digests=digests),
    )
