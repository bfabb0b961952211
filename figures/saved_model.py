"""Sample with a saved model, as all scripts of this folder do: images of seed 0."""

from functions.sampling.generation import ImageSampler, rebuild
from functions.sampling.options import SamplerOptions
from functions.support.checkpoint import SavedModel
from functions.support.device import choose_device


def sampler_of(saved: SavedModel, options: SamplerOptions, device: str = "auto") -> ImageSampler:
    """Return the sampler of a model for the images of seed 0, without calibration and guide."""
    place = choose_device(device)
    return ImageSampler(rebuild(saved, place), options, saved.model.image_shape, 0, place)
