"""Open a saved model as all scripts of this folder do, for the images of seed 0."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from functions.sampling.generation import ImageSampler
from functions.sampling.guides import corrected
from functions.sampling.options import SamplerOptions, add_sampling_flags, given_options
from functions.saved.checkpoint import SavedModel
from functions.saved.loading import open_model
from functions.saved.run_folder import step_of
from functions.support.device import choose_device
from functions.support.processes import SINGLE_PROCESS

# The flags of README's first command, which samples the model in the box.
GUIDED = "--sampler dpm++ --steps 11 --spacing trailing --guide 3000 --guidance 2"


def open_saved(
    path: Path, options: SamplerOptions, device: str = "auto"
) -> tuple[SavedModel, ImageSampler]:
    """Return the model of a run or a file, and its sampler with the guide that its options name."""
    place = choose_device(device)
    saved, denoiser = open_model(path, place)
    image_sampler = ImageSampler(denoiser, options, saved.model.image_shape, 0, place)
    return saved, corrected(image_sampler, saved, SINGLE_PROCESS)


def parse_options(flags: str) -> SamplerOptions:
    """Return the options that these flags of sample.py give."""
    parser = argparse.ArgumentParser()
    add_sampling_flags(parser)
    return SamplerOptions(**given_options(parser.parse_args(flags.split())))


def nearest_snapshot(snapshots: Sequence[Path], step: float) -> Path:
    """Return the snapshot whose step is nearest."""
    return min(snapshots, key=lambda path: abs(step_of(path) - step))
