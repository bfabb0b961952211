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
from dataclasses import replace

from functions.sampling.editing import INPAINTING_STEPS, VERBS
from functions.sampling.generation import open_drawing
from functions.sampling.options import add_out_flag, add_sampling_flags
from functions.sampling.recipes import OF_SAMPLER, parse_drawing
from functions.sampling.samples_folder import drawing_settings, open_folder, samples_folder
from functions.support.command_line import Parser, fraction, positive, run_script
from functions.support.errors import UserError

# An inversion has this many steps, or all if there are fewer, unless --steps says otherwise.
EXACT_STEPS = 200
# An inversion accepts these values of the flags of sampling, and uses the last one of each.
EXACT_FLAGS = {
    "sampler": ("ddpm", "ddim"),
    "eta": (None, 0.0),
    "temperature": (1.0,),
    "guide": (None,),
    "cfg": (None,),
    "enlarge": ([],),
    "precision": ("auto", "float32"),
}


def main() -> None:
    """Read the command line, edit the images, and print which file was written."""
    args = parse_flags()
    image_sampler = open_drawing(args)
    if args.default_steps and not args.steps:
        steps = min(args.default_steps, image_sampler.scheduler.timesteps)
        # Not all steps are done, so the variance is not that of the model.
        options = replace(image_sampler.options, steps=steps, variance=args.variance)
        image_sampler = replace(image_sampler, options=options)
    print(f"{args.verb}: {image_sampler}")
    folder = args.out or samples_folder(image_sampler)
    VERBS[args.verb](args, image_sampler.for_edits(), folder)
    if not args.out:
        open_folder(folder, drawing_settings(image_sampler))


def parse_flags() -> argparse.Namespace:
    """Read the command line. Raises UserError for flags that have no effect on an inversion."""
    parser = Parser(description=__doc__)
    parser.set_defaults(exact=False, default_steps=None)
    verbs = parser.add_subparsers(dest="verb", required=True)
    interpolating = add_verb(verbs, "interpolate", 2, "A B: mix two images.")
    inverting = add_verb(
        verbs,
        "invert",
        1,
        "A: find the noise from which DDIM samples an image, and sample the image from it again, "
        f"in {EXACT_STEPS} steps each way unless --steps says otherwise. Of 40 steps another face "
        "can come back; 100 steps missed it by up to 26 of 255 levels (RMS), 250 by up to 4.",
    )
    inverting.set_defaults(exact=True)
    varying = add_verb(verbs, "vary", 1, "A: sample images similar to one.")
    inpainting = add_verb(
        verbs,
        "inpaint",
        1,
        f"A: regenerate a part of an image, in {INPAINTING_STEPS} steps unless --steps says "
        "otherwise. All else stays as it is, at the size of enlarged samples, too.",
    )
    inpainting.set_defaults(default_steps=INPAINTING_STEPS)

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

    args = parse_drawing(parser, keeps=keeps_of_recipe)
    if len(args.label) > 1:
        raise UserError("an edit has one --label")
    if args.exact:
        args.default_steps = EXACT_STEPS
        for flag, values in EXACT_FLAGS.items():
            if getattr(args, flag) not in values:
                raise UserError(
                    f"--{flag} has no effect on an inversion, which is that of ddim with eta 0 in "
                    "float32, without other models; use --steps and --spacing alone"
                )
            setattr(args, flag, values[-1])
    return args


def keeps_of_recipe(args: argparse.Namespace, key: str) -> bool:
    """Return whether a key of a recipe is used: an inpainting needs ddpm."""
    return not args.exact and (args.verb != "inpaint" or key not in {"sampler", *OF_SAMPLER})


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
