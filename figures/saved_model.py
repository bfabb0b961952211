"""Open a saved model or a recipe with flags of sample.py, as all scripts of this folder do."""

import shlex
from pathlib import Path

from functions.sampling.generation import Pipeline, open_pipeline
from functions.sampling.settings import SamplingFlags, default_settings
from functions.support.command_line import read_flags

# The models in the box that have a guide, and its step.
GUIDE_STEPS = {"ffhq-32": 1000, "ffhq-64": 3000}
# How figures and the card of `ffhq-64` draw with it alone, beside a --guide.
GUIDED = "--sampler dpm++ --steps 11 --spacing trailing --guidance 2"


def open_saved(path: Path, flags: str = "") -> Pipeline:
    """Return the pipeline by a run, a file or a recipe, with these flags, in float32."""
    words = ["--precision", "float32", *shlex.split(flags)]
    begun = SamplingFlags(sampling=default_settings(path))
    return open_pipeline(read_flags(begun, words))
