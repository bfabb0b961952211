"""Edit images with a trained model: `python edit.py interpolate A B` mixes two images.

    python edit.py interpolate A B [RUN]             mixes two images
    python edit.py vary A [RUN]                      samples images similar to one
    python edit.py inpaint A [RUN] --mask FILE       regenerates a part of one

A and B are image files or, except for inpaint, indices of images that the seed generates. Files are
cropped and resized as training images are. The model and the flags of sampling are those of
sample.py. RUN comes right after the images.
"""

import argparse

from functions.sampling.calibration import with_calibration
from functions.sampling.editing import save_inpaintings, save_mixtures, save_variations
from functions.sampling.generation import open_sampler
from functions.sampling.guides import with_guide
from functions.sampling.options import add_out_flag, add_sampling_flags
from functions.sampling.samples_folder import samples_folder
from functions.support.command_line import Parser, exit_on_user_error, fraction, positive
from functions.support.processes import SINGLE_PROCESS

# The verbs of the command line.
VERBS = {"interpolate": save_mixtures, "vary": save_variations, "inpaint": save_inpaintings}


def main() -> None:
    """Read the command line, edit the images, and print which file was written."""
    args = parse_flags()
    saved, image_sampler = open_sampler(args, SINGLE_PROCESS)
    image_sampler = with_calibration(image_sampler, saved)
    image_sampler = with_guide(image_sampler, saved, SINGLE_PROCESS)
    folder = samples_folder(args, saved, image_sampler, SINGLE_PROCESS)
    VERBS[args.verb](args, image_sampler, folder)


def parse_flags() -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    interpolating = add_verb(verbs, "interpolate", 2, "A B: mix two images.")
    varying = add_verb(verbs, "vary", 1, "A: sample images similar to one.")
    inpainting = add_verb(verbs, "inpaint", 1, "A: regenerate a part of an image.")

    for verb in (interpolating, varying):
        verb.add_argument(
            "--depths",
            type=fractions,
            default="0.25,0.5,0.75,1",
            metavar="X,X,...",
            help="How far the images are noised, as fractions of all timesteps. "
            "Default: %(default)s.",
        )

    inpainting.add_argument(
        "--mask",
        help="An image of equal size, white in the part to inpaint. Default: the transparent part "
        "of A is inpainted.",
    )
    inpainting.add_argument(
        "--resample",
        type=positive,
        default=10,
        help="How many times each step is done. Default: %(default)s.",
    )
    inpainting.add_argument(
        "--n",
        "-n",
        type=positive,
        default=36,
        help="How many inpaintings to sample. Default: %(default)s.",
    )
    return parser.parse_args()


def add_verb(verbs, name: str, image_count: int, help: str) -> argparse.ArgumentParser:
    """Add a verb with its images and the flags that all verbs share. Return its parser."""
    parser = verbs.add_parser(name, help=help, description=help)
    parser.add_argument("images", nargs=image_count, metavar="IMAGE")
    add_sampling_flags(parser)
    add_out_flag(parser)
    return parser


def fractions(text: str) -> list[float]:
    """Parse a flag's value: comma-separated numbers from 0 to 1."""
    return [fraction(number) for number in text.split(",")]


if __name__ == "__main__":
    with exit_on_user_error():
        main()
