"""Sample images from a trained model: `python sample.py` takes the newest run and writes a grid.

From pure noise, with the EMA weights, rebuilt from the checkpoint alone: by ancestral sampling over all timesteps
(Algorithm 2 of Ho et al. 2020), or with --sampler and --steps in fewer; the reverse loops are in functions/samplers.py.
--interpolate and --variations sample images between two, or like one, by way of noise; --inpaint a part of one.

Many images, on several GPUs; started again after a kill, only what is missing is made:

    torchrun --nproc-per-node 8 sample.py -n 50000 --individual --out FOLDER
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

from data.datasets import images_of_run
from data.decode import read_image, read_with_mask
from data.pixels import to_uint8
from functions.sampling.calibration import calibrated
from functions.sampling.export import export
from functions.sampling.files import (
    MOST_IN_GRID,
    figures_of,
    image_path,
    open_folder,
    save_pictures,
)
from functions.sampling.generation import (
    ImageSampler,
    Samples,
    batches_of,
    generate_batches,
    open_sampler,
)
from functions.sampling.inpainting import check_sampler, inpaint_image
from functions.sampling.interpolation import save_rows
from functions.sampling.options import add_sampling_flags
from functions.support.command_line import Parser, fraction, plain_errors, positive
from functions.support.errors import UserError
from functions.support.pictures import save_grid, save_image
from functions.support.processes import Processes, joined
from functions.support.run_folder import results_folder
from models.unet import UNet


def main(n: int = 36, gif: bool = False, experiments: str = "") -> None:
    """Read the command line, sample, and say which files were written.

    Every process that torchrun starts runs all of this; rank 0 alone speaks and writes pictures of several images. `n`
    and `gif` are the defaults of these flags; the newest run is one of those whose names begin with `experiments`.
    """
    args = parse_flags(n, gif)
    with joined() as processes:
        saved, image_sampler = open_sampler(args, processes, UNet, experiments)
        if args.inpaint:
            check_sampler(image_sampler.options)
        if args.export:
            processes.from_main(lambda: export(saved, image_sampler, args.export))
            processes.say(f"wrote {args.export}")
            return
        load = lambda name: images_of_run(saved.config["diffusion"], saved.image_shape[-1], name)
        image_sampler = calibrated(image_sampler, saved, args.batch_size, load, processes)

        options, precision = (
            image_sampler.options,
            str(image_sampler.denoiser.precision).removeprefix("torch."),
        )
        slug = f"{saved.name}-{options.slug}{'' if args.precision == 'float32' else f'-{args.precision}'}"
        place = processes.from_main(lambda: results_folder(saved, "samples"))
        folder = args.out or place / f"{slug}-seed{args.seed}"
        if args.interpolate or args.variations or args.inpaint:
            processes.from_main(lambda: sample_from_images(args, image_sampler, folder))
            return
        facts = {
            "checkpoint": saved.digest,
            "weights": saved.kind,
            "seed": args.seed,
            "precision": precision,
        }
        facts |= options.facts(image_sampler.scheduler.timesteps)
        sample_from_noise(args, image_sampler, folder, facts, processes)


def sample_from_noise(
    args: argparse.Namespace,
    image_sampler: ImageSampler,
    folder: Path,
    facts: dict,
    processes: Processes,
) -> None:
    """Sample images 0 .. n-1 and write the files that the flags ask for.

    The processes share batches, which are the same however many processes there are and wherever an earlier start was
    interrupted: so are the images then, bit for bit where the hardware is the same.
    """
    figures = figures_of(args, image_sampler.options.times(image_sampler.scheduler))
    frames = {frame for columns in figures.values() for frame in columns.values()}
    # How many are kept in memory to be seen; without figures the files are enough for the grid
    seen = min(args.n, MOST_IN_GRID) if frames or not args.individual else 0
    batches = batches_of(range(args.n), args.batch_size)
    with ExitStack() as stack:
        there = processes.from_main(
            lambda: stack.enter_context(open_folder(folder, facts, args.individual))
        )
        to_do = [
            batch
            for batch in batches
            if batch.start < seen or (args.individual and not there.issuperset(batch))
        ]
        own = [to_do[i] for i in processes.own_range(len(to_do))]
        count = sum(map(len, to_do))
        others = f" of {args.n}; the others are there" if count < args.n else ""
        processes.say(f"sampling {count} images{others}: {image_sampler.options}, seed {args.seed}")

        pool, writing, kept = stack.enter_context(ThreadPoolExecutor(4)), [], []
        progress = processes.is_main and len(own) > 0
        for batch, samples in zip(
            own, generate_batches(image_sampler, own, frames, progress), strict=True
        ):
            if args.individual:  # in threads, while the next batch is sampled
                list(writing)  # the batch before is on the disk then, or its error is raised
                images, new = (
                    to_uint8(samples.images).numpy(),
                    [k for k, i in enumerate(batch) if i not in there],
                )
                writing = pool.map(
                    save_image, images[new], [image_path(folder, batch[k]) for k in new]
                )
            if batch.start < seen:
                kept.append(samples)
        list(writing)
        kept = [*chain(*processes.gather(kept))]
        if args.individual:
            processes.say(f"all {args.n} images are there: {image_path(folder, 0)} and on")
        if processes.is_main:
            save_pictures(args.n, figures, Samples.joined(kept) if kept else None, folder)


def sample_from_images(args: argparse.Namespace, image_sampler: ImageSampler, folder: Path) -> None:
    """--interpolate, --variations and --inpaint."""
    size = image_sampler.shape[-1]
    source = lambda text: int(text) if text.isdecimal() else read_image(Path(text), size, args.fit)
    two = [source(text) for text in args.interpolate or []]
    one = [source(args.variations)] if args.variations else []
    masked = read_with_mask(args.inpaint, args.mask, size) if args.inpaint else None
    folder.mkdir(parents=True, exist_ok=True)  # only when all images were read
    if two:
        save_rows(image_sampler, two, args.depths, args.batch_size, folder / "interpolation.png")
    if one:
        save_rows(image_sampler, one, args.depths, args.batch_size, folder / "variations.png")
    if masked:
        pictures = inpaint_image(image_sampler, *masked, args.resample, args.n, args.batch_size)
        save_grid(pictures, folder / "inpainting.png", columns=min(len(pictures), 8))
        print(f"wrote {folder / 'inpainting.png'}")
        for i, answer in enumerate(pictures[2:] if args.individual else []):
            save_image(answer, image_path(folder, i))


def parse_flags(n: int, gif: bool) -> argparse.Namespace:
    """Read the command line; `UserError` for more images than a grid has room for."""
    parser = Parser(description=__doc__)
    add_sampling_flags(parser)
    count = f"how many images; behind torchrun write -n, as it takes --n for its own (default: {n})"
    parser.add_argument("--n", "-n", type=positive, default=n, metavar="N", help=count)

    add = parser.add_argument_group("what to write beside the grid").add_argument
    add(
        "--individual",
        action="store_true",
        help="a PNG for each image; those that are there are kept (default: no)",
    )
    add(
        "--strip",
        action="store_true",
        help="a figure of how the noise becomes images (default: no)",
    )
    add(
        "--progressive",
        action="store_true",
        help="a figure of the x_0 that the model sees meanwhile (default: no)",
    )
    animation = (
        f"an animation of how the noise becomes the grid (default: {'yes' if gif else 'no'})"
    )
    add("--gif", action="store_true", default=gif, help=animation)

    add = parser.add_argument_group("what to do instead").add_argument
    image = "an image file, or the number of an image of the seed (default: none)"
    add(
        "--interpolate",
        nargs=2,
        metavar=("A", "B"),
        help=f"mix two images in the noise; each is {image}",
    )
    add("--variations", metavar="A", help=f"images like one, by way of noise; it is {image}")
    depths = "of these two: how far into the noise, as fractions of all timesteps (default: 0.25,0.5,0.75,1)"
    add("--depths", type=fractions, default=(0.25, 0.5, 0.75, 1.0), metavar="X,X,...", help=depths)
    add(
        "--fit",
        action="store_true",
        help="of these two: crop and resize image files of another size (default: no)",
    )
    inpaint = (
        "make a part of an image file anew, --n times: what is white in --mask, or transparent; with ddpm, or ddim "
        "--eta 1 (default: no)"
    )
    add("--inpaint", metavar="IMAGE", help=inpaint)
    add(
        "--mask",
        metavar="FILE",
        help="of --inpaint: an image as large, white where that is made anew (default: no)",
    )
    add(
        "--resample",
        type=positive,
        default=10,
        metavar="N",
        help="of --inpaint: network calls a step (default: 10)",
    )
    export = "write the weights (the EMA's if there are) as one file, or as a folder for diffusers (default: no)"
    add("--export", type=Path, metavar="FILE.safetensors|FOLDER", help=export)

    args = parser.parse_args()
    if args.mask and not args.inpaint:
        raise UserError("--mask is an option of --inpaint")
    if args.n > MOST_IN_GRID and (args.inpaint or not args.individual):
        raise UserError(
            f"a grid shows {MOST_IN_GRID} images at most; for {args.n} add --individual"
        )
    return args


def fractions(text: str) -> tuple[float, ...]:
    """A flag's type: numbers from 0 to 1 with commas between."""
    return tuple(fraction(number) for number in text.split(","))


if __name__ == "__main__":
    with plain_errors():
        main()
