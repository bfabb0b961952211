"""Open a saved model with flags of sample.py, as all scripts of this folder do."""

import argparse
import shlex
from pathlib import Path

from functions.sampling.generation import ImageSampler, enlarged, guided, open_sampler
from functions.sampling.options import add_sampling_flags
from functions.saved.run_folder import PRETRAINED

# The models in the box that draw: the steps of their guides, and flags of sample.py.
GUIDE_STEPS = {"ffhq-32": 1000, "ffhq-64": 3000}
FLAGS = {
    "ffhq-32": "--sampler dpm++ --steps 16 --spacing trailing --guide 1000 --temperature 0.7",
    "ffhq-64": "--sampler dpm++ --steps 11 --spacing trailing --guide 3000 --guidance 2",
}
# README's first command draws with the first, and the others enlarge its samples.
BASE, *ENLARGERS = (PRETRAINED.with_name(f"ffhq-{size}.safetensors") for size in (32, 64, 128))


def open_saved(path: Path, flags: str = "") -> ImageSampler:
    """Return the sampler of the model of a run or a file, with these flags, in float32."""
    parser = argparse.ArgumentParser()
    add_sampling_flags(parser)
    args = parser.parse_args([str(path), "--precision", "float32", *shlex.split(flags)])
    return guided(open_sampler(args))


def open_cascade(*enlargers: Path) -> ImageSampler:
    """Return the sampler of BASE, by its FLAGS, and of these models that enlarge its samples."""
    image_sampler = open_saved(BASE, f"{FLAGS[BASE.stem]} --device cpu")
    for path in enlargers:
        image_sampler = enlarged(image_sampler, path)
    return image_sampler
