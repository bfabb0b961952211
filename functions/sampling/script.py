"""What `sample.py` and `sampleFFHQ.py` do with their flags: from a checkpoint to files.

Every process that torchrun starts runs all of this; rank 0 alone decides, speaks and draws pictures of several images.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from functions.sampling.generation import ImageSampler, rebuild
from functions.sampling.grids import MOST_IN_GRID, draw_images
from functions.sampling.latent_pictures import Pixels, draw_interpolation, draw_variations, is_number, read_image
from functions.sampling.options import SamplerOptions, add_sampler_flags
from functions.support.checkpoint import SavedModel, export_weights, load_weights
from functions.support.command_line import fraction, positive
from functions.support.device import DTYPES, choose_device, choose_precision
from functions.support.errors import UserError
from functions.support.processes import Processes, joined
from functions.support.run_folder import first_sound, folder_of


def add_sampling_flags(parser: argparse.ArgumentParser, n: int) -> None:
    """The flags of both scripts; `n` is the default number of images."""
    parser.add_argument(
        "checkpoint",
        nargs="?",
        type=Path,
        help="a checkpoint, an exported .safetensors, or a run folder; the newest run's when left out",
    )
    parser.add_argument(
        "--n",
        "-n",  # torchrun of Python before 3.12.7 refuses --n, which several flags of its own begin with
        type=positive,
        default=n,
        metavar="N",
        help=f"how many images ({n}); -n behind torchrun, which takes --n for its own",
    )
    parser.add_argument("--seed", type=int, default=0, help="image i depends on the seed and i alone (0)")
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N", help="images at a time (64)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where pictures go; samples/ in the run's folder")
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="FOLDER", help="where run folders are")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--precision", default="float32", choices=("auto", *DTYPES), help="of the network (float32)")
    add_sampler_flags(parser)

    beside = parser.add_argument_group("what to draw beside the grid")
    beside.add_argument("--individual", action="store_true", help="one PNG for each image; those there are kept")
    beside.add_argument("--strip", action="store_true", help="the denoising of some images, as one figure")
    beside.add_argument("--progressive", action="store_true", help="the same of the model's x_0: what it sees in noise")
    beside.add_argument("--gif", action="store_true", help="the grid denoising, as an animated GIF")

    instead = parser.add_argument_group("what to do instead")
    image = "an image file, or the number of an image of the seed"
    instead.add_argument(
        "--interpolate", nargs=2, metavar=("A", "B"), help=f"between two images, by way of noise; each is {image}"
    )
    instead.add_argument("--variations", metavar="A", help=f"images like one image, by way of noise; it is {image}")
    instead.add_argument(
        "--depths",
        type=shares,
        default=(0.25, 0.5, 0.75, 1.0),
        metavar="X,X,...",
        help="of these two: how far into the noise, as shares of all timesteps (0.25,0.5,0.75,1)",
    )
    instead.add_argument("--fit", action="store_true", help="crop and resize image files of another size")
    instead.add_argument(
        "--export",
        type=Path,
        metavar="FILE.safetensors",
        help="write the weights (EMA's if there are) and the config there, and draw nothing",
    )


def shares(text: str) -> tuple[float, ...]:
    """A flag's type: numbers from 0 to 1 with commas between."""
    return tuple(fraction(part) for part in text.split(","))


def sample_to_files(
    args: argparse.Namespace,
    find_checkpoints: Callable[[], Sequence[Path]],
    build_model: Callable[..., nn.Module],
    pixels: Pixels,
) -> None:
    """Do what the flags of `add_sampling_flags` ask for.

    Args:
        find_checkpoints: gives checkpoints or exported files, of which the first sound one is taken.
        build_model: the model's class; takes the config's `model` fields.

    Raises:
        UserError, ConfigError: what can be known beforehand is: nothing has been drawn or written then.
    """
    settings = SamplerOptions.from_args(args)
    refuse_contradictions(args)
    with joined() as processes:
        device = choose_device(args.device, processes.local_rank if processes.count > 1 else None)
        precision = choose_precision(args.precision, device)
        saved = load(find_checkpoints, processes)
        denoiser = rebuild(build_model, saved, device, precision)
        settings.times(denoiser.scheduler)  # refuses numbers of steps that the model does not have
        processes.say(str(saved))
        if args.export:
            processes.from_main(lambda: export_weights(saved, args.export))
            processes.say(f"wrote {args.export}")
            return

        drawing = ImageSampler(denoiser, settings, saved.image_shape, args.seed, device)
        slug = f"{saved.path.stem}-{settings.slug}{'' if args.precision == 'float32' else f'-{args.precision}'}"
        folder = args.out or folder_of(saved.path) / "samples" / f"{slug}-seed{args.seed}"
        if args.interpolate or args.variations is not None:
            processes.from_main(lambda: draw_from_images(args, drawing, pixels, folder))
            return
        facts = lambda: {
            "checkpoint": saved.digest, "weights": saved.kind, "seed": args.seed,
            "precision": str(precision).removeprefix("torch."), **settings.facts(denoiser.scheduler.timesteps),
        }  # fmt: skip
        draw_images(args, drawing, folder, facts, pixels.to_uint8, processes)


def refuse_contradictions(args: argparse.Namespace) -> None:
    """`UserError` for flags of which one would have to be ignored."""
    if args.n > MOST_IN_GRID and not args.individual:
        raise UserError(f"a grid shows {MOST_IN_GRID} images at most; for {args.n} add --individual")
    if args.interpolate and len({is_number(text) for text in args.interpolate}) > 1:
        raise UserError("--interpolate takes two image files or two numbers, not one of each")
    if args.interpolate or args.variations is not None:
        for flag in ("individual", "strip", "progressive"):
            if getattr(args, flag):
                raise UserError(f"--interpolate and --variations draw nothing else; leave out --{flag}")
    elif args.fit:
        raise UserError("--fit is for the image files of --interpolate and --variations")


def load(find_checkpoints: Callable[[], Sequence[Path]], processes: Processes) -> SavedModel:
    """The first sound checkpoint, in every process."""
    found = []

    def find() -> Path:
        found.append(first_sound(find_checkpoints(), load_weights))
        return found[0].path

    checkpoint = processes.from_main(find)
    return found[0] if found else load_weights(checkpoint)


def draw_from_images(args: argparse.Namespace, drawing: ImageSampler, pixels: Pixels, folder: Path) -> None:
    """--interpolate and --variations."""
    named = [*(args.interpolate or []), *([args.variations] if args.variations is not None else [])]
    for text in named:
        if not is_number(text):
            read_image(text, drawing, pixels, args.fit)  # refused before anything is written
    folder.mkdir(parents=True, exist_ok=True)
    if args.interpolate:
        draw_interpolation(args.interpolate, args.depths, args.batch_size, args.fit, drawing, pixels, folder)
    if args.variations is not None:
        draw_variations(args.variations, args.depths, args.batch_size, args.fit, drawing, pixels, folder)
