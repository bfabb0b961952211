"""Open a saved model as all scripts of this folder do, for the images of seed 0."""

from pathlib import Path

from functions.sampling.generation import ImageSampler
from functions.sampling.options import SamplerOptions
from functions.saved.checkpoint import SavedModel
from functions.saved.loading import open_model
from functions.support.device import choose_device


def open_saved(
    path: Path, options: SamplerOptions, device: str = "auto"
) -> tuple[SavedModel, ImageSampler]:
    """Return the model of a run or a file, and its sampler, without calibration and guide."""
    place = choose_device(device)
    saved, denoiser = open_model(path, place)
    return saved, ImageSampler(denoiser, options, saved.model.image_shape, 0, place)
