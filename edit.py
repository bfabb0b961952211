"""Edit images with a trained model: `python edit.py interpolate A B` mixes two images.

    python edit.py interpolate A B [RUN]             mixes two images
    python edit.py interpolate A B [RUN] --exact     mixes the noise that they are sampled from
    python edit.py invert A [RUN]                    finds this noise, and samples from it
    python edit.py vary A [RUN]                      samples images similar to one
    python edit.py inpaint A [RUN] --mask FILE       regenerates a part of one

A and B are image files or, except for inpaint, indices of images that the seed generates. Files are
cropped and resized as training images are, to the size of the model: with --enlarge what they have
beyond it is lost, except for inpaint. RUN comes right after the images; the flags of sampling are
those of sample.py. Of a recipe, invert and --exact use the model alone, and inpaint the models.
"""

if __name__ == "__main__":
    from functions.support.threads import limit_spinning

    limit_spinning()

import argparse
from functools import partial

from functions.sampling.editing import EXACT_STEPS, INPAINTING_STEPS, VERBS, edited_path, use_of
from functions.sampling.generation import given, open_drawing
from functions.sampling.settings import add_out_flag, add_sampling_flags, settings_of
from functions.support.command_line import Parser, fraction, positive, run_script
from functions.support.errors import UserError


def main() -> None:
    """Read the command line, edit the images, and print which file was written."""
    args = parse_flags()
    use = use_of(args.verb, args.exact)
    config = settings_of(args, use=use)
    if len(config.label) > 1:
        raise UserError("an edit has one --label")
    drawing = open_drawing(args, config, use.steps)
    print(f"{args.verb}: {drawing}")
    # All that an edit draws has the conditions of image 0.
    VERBS[args.verb](args, given(drawing, [0]), partial(edited_path, args, drawing))


def parse_flags() -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__)
    parser.set_defaults(exact=False)
    verbs = parser.add_subparsers(dest="verb", required=True)
    interpolating = add_verb(verbs, "interpolate", 2, "A B: mix two images.")
    add_verb(
        verbs,
        "invert",
        1,
        "A: find the noise from which DDIM samples an image, and sample the image from it again, "
        f"in {EXACT_STEPS} steps each way unless --steps says otherwise. Of 40 steps another face "
        "can come back; 100 steps missed it by up to 26 of 255 levels (RMS), 250 by up to 4.",
    )
    varying = add_verb(verbs, "vary", 1, "A: sample images similar to one.")
    inpainting = add_verb(
        verbs,
        "inpaint",
        1,
        f"A: regenerate a part of an image, in {INPAINTING_STEPS} steps unless --steps says "
        "otherwise. All else stays as it is, at the size of enlarged samples, too.",
    )

    mixing = interpolating.add_mutually_exclusive_group()
    for group in (mixing, varying):
        group.add_argument(
            "--depths",
            type=fractions,
            default="0.25,0.5,0.75,1",
            metavar="X,X,...",
            help="How far the images are noised, as fractions of all timesteps. "
            "Default: %(default)s.",
        )

    mixing.add_argument(
        "--exact",
        action="store_true",
        help="Mix the noise that `edit.py invert` finds, and sample from the mixtures, by default "
        f"in {EXACT_STEPS} steps. Default: no.",
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
    run_script(main)
