"""Open a saved model or a recipe with flags of sample.py, as all scripts of this folder do."""

import shlex
from pathlib import Path

from functions.sampling.generation import Pipeline, open_pipeline
from functions.sampling.settings import add_sampling_flags, settings_of
from functions.support.command_line import Parser

# The models in the box that have a guide, and its step.
GUIDE_STEPS = {"ffhq-32": 1000, "ffhq-64": 3000}
# How figures and the card of `ffhq-64` draw with it alone, beside a --guide.
GUIDED = "--sampler dpm++ --steps 11 --spacing trailing --guidance 2"


def open_saved(path: Path, flags: str = "") -> Pipeline:
    """Return the pipeline by a run, a file or a recipe, with these flags, in float32."""
    parser = Parser()
    add_sampling_flags(parser)
    words = [str(path), "--precision", "float32", *shlex.split(flags)]
    args = parser.parse_args(words)
    return open_pipeline(args, settings_of(args))
