"""Open a saved model with flags of sample.py, as all scripts of this folder do."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from functions.sampling.generation import ImageSampler, open_sampler
from functions.sampling.guides import guided
from functions.sampling.options import add_sampling_flags
from functions.saved.checkpoint import SavedModel
from functions.saved.run_folder import PRETRAINED, step_of
from functions.support.processes import SINGLE_PROCESS

# The flags of README's first command, which samples the model in the box, and enlarges its samples.
GUIDE_STEP = 3000
GUIDED = f"--sampler dpm++ --steps 11 --spacing trailing --guide {GUIDE_STEP} --guidance 2"
ENLARGER = PRETRAINED.with_name("ffhq-128.safetensors")


def open_saved(path: Path, flags: str = "") -> tuple[SavedModel, ImageSampler]:
    """Return the model of a run or a file, and the sampler of these flags, in float32."""
    parser = argparse.ArgumentParser()
    add_sampling_flags(parser)
    args = parser.parse_args([str(path), "--precision", "float32", *flags.split()])
    saved, image_sampler = open_sampler(args, SINGLE_PROCESS)
    return saved, guided(image_sampler, saved, SINGLE_PROCESS)


def nearest_snapshot(snapshots: Sequence[Path], step: float) -> Path:
    """Return the snapshot whose step is nearest."""
    return min(snapshots, key=lambda path: abs(step_of(path) - step))
