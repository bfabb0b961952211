"""Sample images from a trained model: `python sample.py` takes the newest run and writes a grid.

The network is rebuilt from the checkpoint alone, with its EMA weights. Images are sampled from pure
noise over all timesteps (Algorithm 2 of Ho et al. 2020), or with --sampler and --steps in fewer;
the reverse loops are in functions/samplers.py. --interpolate and --variations sample images
between two, or like one, by way of noise. --inpaint makes a part of one anew.

Many images can be sampled on several GPUs. Started again after a kill, this makes only those that
are missing:

    torchrun --nproc-per-node 8 sample.py -n 50000 --individual --out FOLDER
"""

import argparse
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np

from data.decode import read_image, read_with_mask
from data.pixels import to_uint8
from functions.sampling.calibration import calibrated
from functions.sampling.export import export
from functions.sampling.files import (
    MOST_IN_GRID,
    figures_of,
    image_path,
    label_of,
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
from functions.support.command_line import Parser, exit_on_user_error, fraction, positive
from functions.support.errors import UserError
from functions.support.pictures import save_grid, save_image
from functions.support.processes import Processes, distributed
from functions.support.run_folder import results_folder

# Which flags have an effect: always, and in sampling from noise or in what is done instead of it.
ALWAYS = {"checkpoint", "runs", "device", "precision", "seed"}
SAMPLING = {"batch_size", "out", "sampler", "steps", "spacing", "eta", "variance", "calibrate"}
ROWS = {*SAMPLING, "depths", "fit"}
TAKES = {
    "noise": {*SAMPLING, "n", "individual", "strip", "progressive", "gif"},
    "interpolate": ROWS,
    "variations": ROWS,
    "inpaint": {*SAMPLING, "n", "individual", "mask", "resample"},
    "export": set(),
}


def main(n: int = 36, gif: bool = False, experiments: str = "") -> None:
    """Read the command line, sample, and say which files were written.

    `n` and `gif` are the defaults of these flags. The newest run is one of those whose names
    begin with `experiments`.
    """
    args = parse_flags(n, gif)
    # Every process that torchrun starts runs all of this. Rank 0 alone speaks, and writes pictures
    # of several images.
    with distributed() as processes:
        # The network and its schedule come from the checkpoint alone.
        saved, image_sampler = open_sampler(args, processes, experiments)
        options = image_sampler.options
        if args.inpaint:
            check_sampler(options)
        if args.export:
            processes.on_main(lambda: export(saved, image_sampler, args.export))
            processes.print_main(f"wrote {args.export}")
            return

        image_sampler = calibrated(image_sampler, saved, processes)

        # The folder's name says what differs from the defaults.
        folder_name = f"{saved.name}-{options.short_name}"
        if args.precision != "float32":
            folder_name += f"-{args.precision}"
        place = processes.on_main(lambda: results_folder(saved, "samples"))
        folder = args.out or place / f"{folder_name}-seed{args.seed}"

        if args.interpolate or args.variations or args.inpaint:
            processes.on_main(lambda: sample_from_images(args, image_sampler, folder))
            return
        # These facts decide the pixels. A folder holds single images of the same facts alone.
        facts = {
            "checkpoint": saved.digest,
            "weights": saved.kind,
            "seed": args.seed,
            "precision": str(image_sampler.denoiser.precision).removeprefix("torch."),
            **options.facts(image_sampler.scheduler.timesteps),
        }
        sample_from_noise(args, image_sampler, folder, facts, processes)


def sample_from_noise(
    args: argparse.Namespace,
    image_sampler: ImageSampler,
    folder: Path,
    facts: dict,
    processes: Processes,
) -> None:
    """Sample images 0 .. n-1 and write the files that the flags ask for.

    The processes share batches, which are the same however many processes there are and wherever
    an earlier start was interrupted. So the noise is the same, and so are the images, up to
    rounding: threads and short memory add in other orders.
    """
    figures = figures_of(args, image_sampler.times)
    frames = {frame for columns in figures.values() for frame in columns.values()}
    # The first images are kept in memory, to be seen in the grid and the figures. Without figures
    # none need be kept if each has a file: the grid is then made of the files.
    seen = min(args.n, MOST_IN_GRID) if frames or not args.individual else 0

    with ExitStack() as stack:
        # Rank 0 alone enters the folder, and holds it until the last batch is written.
        opened = open_folder(folder, facts, args.individual)
        existing = processes.on_main(lambda: stack.enter_context(opened))

        to_do = []
        for batch in batches_of(range(args.n), image_sampler.batch_size):
            missing = args.individual and not existing.issuperset(batch)
            if missing or batch.start < seen:
                to_do.append(batch)
        count = sum(map(len, to_do))
        others = f" of {args.n}; the others are there" if count < args.n else ""
        processes.print_main(
            f"sampling {count} images{others}: {image_sampler.options}, seed {args.seed}"
        )

        # Each batch begins as noise. The sampler takes it to images when `write_and_keep` asks for
        # it. After an error the generator is closed at once, and ends its progress bar.
        batches = [to_do[i] for i in processes.shard(len(to_do))]
        progress = processes.is_main and bool(batches)
        with closing(generate_batches(image_sampler, batches, frames, progress)) as sampled:
            kept = write_and_keep(args, zip(batches, sampled, strict=True), folder, existing, seen)

        # No process goes on from here before all have written their images.
        gathered = processes.gather(kept)
        if args.individual:
            processes.print_main(f"all {args.n} images are there: {image_path(folder, 0)} and on")
        if processes.is_main:
            kept = [samples for part in gathered for samples in part]
            samples = Samples.concatenated(kept) if kept else None
            save_pictures(args.n, figures, samples, folder)


def write_and_keep(
    args: argparse.Namespace,
    sampled: Iterable[tuple[range, Samples]],
    folder: Path,
    existing: set[int],
    seen: int,
) -> list[Samples]:
    """Write the single images that do not exist yet, and return the samples that are to be seen."""
    kept = []
    writing = []
    with ThreadPoolExecutor(4) as pool:
        for batch, samples in sampled:
            if args.individual:
                # The batch before is on the disk after this, or its error is raised.
                list(writing)
                # Threads write this batch while the next one is sampled.
                images = to_uint8(samples.images).numpy()
                new = [k for k, i in enumerate(batch) if i not in existing]
                paths = [image_path(folder, batch[k]) for k in new]
                writing = pool.map(save_image, images[new], paths)
            if batch.start < seen:
                kept.append(samples)
        # An error of the last batch is raised here.
        list(writing)
    return kept


def sample_from_images(args: argparse.Namespace, image_sampler: ImageSampler, folder: Path) -> None:
    """Do what --interpolate, --variations and --inpaint ask for."""
    size = image_sampler.shape[-1]

    def source_of(text):
        return int(text) if text.isdecimal() else read_image(Path(text), size, args.fit)

    # The folder is made only when all images have been read. The names of files tell their
    # sources, so that a picture of other sources is not overwritten.
    rows = {}
    for kind, texts in (("interpolation", args.interpolate), ("variations", args.variations)):
        if texts:
            sources = [source_of(text) for text in texts]
            labels = map(label_of, texts, sources)
            rows["-".join([kind, *labels])] = sources
    if args.inpaint:
        image, mask = read_with_mask(args.inpaint, args.mask, size)
        # The same image with another mask is another source.
        inpainting = f"inpainting-{label_of(args.inpaint, np.dstack([image, mask]))}"
    folder.mkdir(parents=True, exist_ok=True)

    for name, sources in rows.items():
        save_rows(image_sampler, sources, args.depths, folder / f"{name}.png")
    if args.inpaint:
        pictures = inpaint_image(image_sampler, image, mask, args.resample, args.n)
        path = folder / f"{inpainting}.png"
        save_grid(pictures, path, columns=min(len(pictures), 8))
        print(f"wrote {path}")
        if args.individual:
            # The first two pictures are the image and what is kept of it. A name of digits alone
            # is that of a sample, for which the folder's manifest vouches.
            for i, answer in enumerate(pictures[2:]):
                save_image(answer, folder / f"{inpainting}-{i:05d}.png")


def parse_flags(n: int, gif: bool) -> argparse.Namespace:
    """Read the command line; `UserError` for more images than a grid has room for."""
    parser = Parser(description=__doc__)
    add_sampling_flags(parser)
    parser.add_argument(
        "--n",
        "-n",
        type=positive,
        default=n,
        help="How many images to sample. Behind torchrun write -n, as it takes --n for its own. "
        "Default: %(default)s.",
    )

    group = parser.add_argument_group("what to write beside the grid")
    group.add_argument(
        "--individual",
        action="store_true",
        help="Write a PNG for each image; those that are there are kept. Default: no.",
    )
    group.add_argument(
        "--strip",
        action="store_true",
        help="Draw a figure of how the noise becomes images. Default: no.",
    )
    group.add_argument(
        "--progressive",
        action="store_true",
        help="Draw a figure of the x_0 that the model sees meanwhile. Default: no.",
    )
    group.add_argument(
        "--gif",
        action="store_true",
        default=gif,
        help="Write an animation of how the noise becomes the grid. "
        "Default: no, but yes in sampleFFHQ.py.",
    )

    group = parser.add_argument_group("what to do instead")
    group.add_argument(
        "--interpolate",
        nargs=2,
        metavar=("A", "B"),
        help="Mix two images in the noise; each is an image file, or the number of an image of "
        "the seed. Default: none.",
    )
    group.add_argument(
        "--variations",
        nargs=1,
        metavar="A",
        help="Sample images like one, by way of noise; it is an image file, or the number of an "
        "image of the seed. Default: none.",
    )
    group.add_argument(
        "--depths",
        type=fractions,
        default="0.25,0.5,0.75,1",
        metavar="X,X,...",
        help="How far into the noise both of these go, as fractions of all timesteps. "
        "Default: %(default)s.",
    )
    group.add_argument(
        "--fit",
        action="store_true",
        help="Crop and resize image files of another size for both of these. Default: no.",
    )
    group.add_argument(
        "--inpaint",
        metavar="IMAGE",
        help="Make a part of an image file anew, --n times: what is white in --mask, or "
        "transparent. It takes --sampler ddpm, or ddim with --eta 1. Default: none.",
    )
    group.add_argument(
        "--mask",
        metavar="FILE",
        help="For --inpaint: an image as large, white where that is made anew. Default: none.",
    )
    group.add_argument(
        "--resample",
        type=positive,
        default=10,
        metavar="N",
        help="For --inpaint: how many network calls a step takes. Default: %(default)s.",
    )
    group.add_argument(
        "--export",
        type=Path,
        metavar="FILE.safetensors|FOLDER",
        help="Write the weights, the EMA's if there are, as one file, or as a folder for "
        "diffusers. Default: no.",
    )

    args = parser.parse_args()
    refuse_ignored(args, parser.parse_args([]))
    if args.n > MOST_IN_GRID and (args.inpaint or not args.individual):
        raise UserError(
            f"a grid shows {MOST_IN_GRID} images at most; for {args.n} add --individual"
        )
    return args


def refuse_ignored(args: argparse.Namespace, defaults: argparse.Namespace) -> None:
    """Raise UserError for a flag that would be ignored and is not at its default."""
    # After an export nothing else is done. All else can be asked for together.
    actions = ["export"] if args.export else [name for name in TAKES if getattr(args, name, None)]
    taken = ALWAYS.union(actions, *(TAKES[action] for action in actions or ["noise"]))
    for name, value in vars(args).items():
        if name not in taken and value != getattr(defaults, name):
            takers = [action for action in TAKES if name in TAKES[action]]
            word = "beside" if actions else "without"
            others = " or ".join(f"--{action}" for action in actions or takers)
            raise UserError(f"--{name.replace('_', '-')} would be ignored {word} {others}")


def fractions(text: str) -> list[float]:
    """A flag's type: numbers from 0 to 1 with commas between."""
    return [fraction(number) for number in text.split(",")]


if __name__ == "__main__":
    with exit_on_user_error():
        main()
