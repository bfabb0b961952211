"""Edit images with a trained model: `python edit.py interpolate A B` mixes two images.

    python edit.py interpolate A B [RUN]             mixes two images
    python edit.py vary A [RUN]                      samples images similar to one
    python edit.py inpaint A [RUN] --mask FILE       regenerates a part of one
    python edit.py enlarge FILE [MODEL]              doubles the size of a picture of a face

A and B are image files or, except for inpaint, indices of images that the seed generates. Files are
cropped and resized as training images are, to the size of the model: with --enlarge what they have
beyond it is lost, except for inpaint. RUN comes right after the images; the flags of sampling are
those of sample.py. inpaint has its own sampler. enlarge takes the picture as it is.
"""

if __name__ == "__main__":
    from functions.support.start import prepare

    prepare()

import argparse
from dataclasses import dataclass
from math import inf
from pathlib import Path

from functions.sampling.editing import (
    INPAINTING_STEPS,
    VERBS,
    check_edit,
    save_enlarged,
)
from functions.sampling.generation import open_pipeline
from functions.sampling.settings import SeedFlags, add_sampling_flags, settings_of
from functions.saved.run_folder import PRETRAINED, DeviceFlags
from functions.support.command_line import Parser, add_flags, run_script
from functions.support.device import DTYPES
from functions.support.settings import choice, setting


def main() -> None:
    """Read the command line, edit the images, and print which file was written."""
    args = parse_flags()
    if args.verb == "enlarge":
        save_enlarged(args)
        return
    save, taken, steps = VERBS[args.verb]
    config = settings_of(args, taken=taken)
    check_edit(args.verb, config)
    pipeline = open_pipeline(args, config, steps)
    print(f"{args.verb}: {pipeline}")
    save(args, pipeline)


@dataclass(frozen=True)
class EditFlags(SeedFlags):
    """The flags of all verbs."""

    # The folder for the written files. Default: a new folder in samples/ of the run, or here for a
    # recipe.
    out: Path | None = None


@dataclass(frozen=True)
class DepthFlags(EditFlags):
    """The flags of interpolate and vary."""

    # How far the images are noised, as fractions of all timesteps.
    depths: tuple[float, ...] = setting((0.25, 0.5, 0.75, 1.0), at_most=1)


@dataclass(frozen=True)
class InpaintFlags(EditFlags):
    """The flags of inpaint."""

    # An image of equal size, white in the part to inpaint. Default: the transparent part of A is
    # inpainted.
    mask: str | None = None
    # How many times each step is done.
    resample: int = 10
    # How many inpaintings to sample.
    n: int = setting(36, also=["-n"])


@dataclass(frozen=True)
class EnlargeFlags(DeviceFlags):
    """The flags of enlarge."""

    # How many times the size is doubled.
    times: int = setting(1, at_most=4)
    # The seed of the details' noise.
    seed: int = setting(0, at_least=-inf)
    # The folder for the written file. Default: a new folder in samples/.
    out: Path | None = None
    # The number format that the network computes in. auto is that of the model's training, or
    # float32 if the device has no instructions for it.
    precision: str = choice("auto", *DTYPES)


def parse_flags() -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name, image_count, flags_class, help in (
        ("interpolate", 2, DepthFlags, "A B: mix two images."),
        ("vary", 1, DepthFlags, "A: sample images similar to one."),
        (
            "inpaint",
            1,
            InpaintFlags,
            f"A: regenerate a part of an image, in {INPAINTING_STEPS} steps unless --steps says "
            "otherwise. All else stays as it is, at the size of enlarged samples, too.",
        ),
    ):
        verb = verbs.add_parser(name, help=help, description=help)
        verb.add_argument("images", nargs=image_count, metavar="IMAGE")
        add_sampling_flags(verb, flags_class)
    text = "FILE: double the size of a picture of a face, in which the model draws the details."
    enlarge = verbs.add_parser("enlarge", help=text, description=text)
    enlarge.add_argument("images", nargs=1, metavar="FILE")
    enlarge.add_argument(
        "model",
        nargs="?",
        type=Path,
        metavar="MODEL",
        default=PRETRAINED.with_name("ffhq-details.safetensors"),
        help="A run or a file of the preset ffhq-details. Default: the included one.",
    )
    add_flags(enlarge, EnlargeFlags)
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)
