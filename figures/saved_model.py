"""Open a saved model or a recipe with flags of sample.py, as all scripts of this folder do."""

import shlex
from pathlib import Path

from functions.sampling.generation import ImageSampler, open_drawing
from functions.sampling.options import add_sampling_flags
from functions.sampling.recipes import parse_drawing
from functions.support.command_line import Parser

# The models in the box that have a guide, and its step.
GUIDE_STEPS = {"ffhq-32": 1000, "ffhq-64": 3000}
# How figures and the card of `ffhq-64` draw with it alone.
GUIDED = "--sampler dpm++ --steps 11 --spacing trailing --guide 3000 --guidance 2"


def open_saved(path: Path, flags: str = "") -> ImageSampler:
    """Return the sampler of a run, a file or a recipe, with these flags, in float32."""
    parser = Parser()
    add_sampling_flags(parser)
    words = [str(path), "--precision", "float32", *shlex.split(flags)]
    return open_drawing(parse_drawing(parser, words))
