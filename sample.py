"""Sample images from a trained model: `python sample.py` uses the newest run and writes a grid.

Without any run, it uses a model in pretrained/, which comes with the repository.

The network and its EMA weights come from the checkpoint, and no other file is needed. Images are
sampled from pure noise over all timesteps (Algorithm 2 of Ho et al. 2020), or in fewer steps with
--sampler and --steps. functions/samplers.py has the reverse loops. --interpolate mixes two images,
--variations samples images similar to one, and --inpaint regenerates a part of one.

Several GPUs can divide many images among them. If this command is interrupted, starting it again
samples only the missing images:

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
from functions.sampling.calibration import with_calibration
from functions.sampling.export import export
from functions.sampling.files import (
    GRID_LIMIT,
    figures_of,
    image_path,
    label_of,
    open_folder,
    save_pictures,
    wait_for_images,
)
from functions.sampling.generation import (
    ImageSampler,
    Samples,
    batches_of,
    generate_batches,
    open_sampler,
)
from functions.sampling.guidance import with_guide
from functions.sampling.inpainting import check_sampler, inpaint_image
from functions.sampling.interpolation import save_rows
from functions.sampling.options import add_sampling_flags
from functions.support.command_line import Parser, exit_on_user_error, fraction, positive
from functions.support.errors import UserError
from functions.support.pictures import save_grid, save_image
from functions.support.processes import Processes, distributed
from functions.support.run_folder import results_folder

# These flags always have an effect.
ALWAYS = {"checkpoint", "runs", "device", "precision", "seed"}
SAMPLING = {"batch_size", "out", "sampler", "steps", "spacing", "eta", "variance"}
SAMPLING |= {"calibrate", "guide", "guidance"}
ROWS = {*SAMPLING, "depths", "fit"}
# These flags have an effect together with each action. The default, "noise", samples from noise.
ACTION_FLAGS = {
    "noise": {*SAMPLING, "n", "individual", "strip", "progressive", "gif"},
    "interpolate": ROWS,
    "variations": ROWS,
    "inpaint": {*SAMPLING, "n", "individual", "mask", "resample"},
    "export": set(),
}


def main(n: int = 36, gif: bool = False, name_prefix: str = "") -> None:
    """Read the command line, sample, and print which files were written.

    `n` and `gif` are the defaults of these flags. Without RUN, the newest run whose name begins
    with `name_prefix` is used.
    """
    args = parse_flags(n, gif)
    # Every process that torchrun starts executes all of this. Only rank 0 prints and writes the
    # pictures that show several images.
    with distributed() as processes:
        # The network and its schedule come only from the checkpoint.
        saved, image_sampler = open_sampler(args, processes, name_prefix)
        if args.inpaint:
            check_sampler(image_sampler.options)
        if args.export:
            if processes.is_main:
                export(saved, image_sampler, args.export)
                print(f"wrote {args.export}")
            return

        # Both have no effect unless a flag asks for them. The calibration is first, because it is
        # fitted to the model alone; `with_guide` calibrates the guide.
        image_sampler = with_calibration(image_sampler, saved)
        image_sampler = with_guide(image_sampler, saved, processes)
        options = image_sampler.options

        # The folder's name contains the options that differ from the defaults, and the precision.
        precision = image_sampler.precision_facts
        folder_name = f"{saved.name}-{options.short_name}-{precision['precision']}"
        results = processes.on_main(lambda: results_folder(saved, "samples"))
        folder = args.out or results / f"{folder_name}-seed{args.seed}"

        if args.interpolate or args.variations or args.inpaint:
            if processes.is_main:
                sample_from_images(args, image_sampler, folder)
            return
        # These facts determine the pixels, and are the same for all single images of a folder.
        facts = {
            "checkpoint": saved.digest,
            "weights": saved.kind,
            "seed": args.seed,
            **precision,
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

    The processes divide the batches among them. The batches depend neither on the number of
    processes nor on where an earlier command was interrupted. So the images are the same up to
    rounding.
    """
    figures = figures_of(args, image_sampler)
    if figures and args.individual and processes.count > 1:
        # For figures the processes would wait for each other until the last image.
        processes.print_main("with --individual, several processes draw no figures")
        figures = {}
    frames = {frame for figure in figures.values() for frame in figure.values()}
    # The first images stay in memory for the grid and the figures. If there are no figures and each
    # image has a file, the grid is made from the files instead.
    shown_count = min(args.n, GRID_LIMIT) if frames or not args.individual else 0

    with ExitStack() as stack:
        # Only rank 0 locks the folder, until the last batch is written.
        context = open_folder(folder, facts, args.individual)
        indices_on_disk = processes.on_main(lambda: stack.enter_context(context))

        remaining = []
        for batch in batches_of(range(args.n), image_sampler.batch_size):
            incomplete = args.individual and not indices_on_disk.issuperset(batch)
            if incomplete or batch.start < shown_count:
                remaining.append(batch)
        count = sum(map(len, remaining))
        others = f" of {args.n}; the others exist" if count < args.n else ""
        processes.print_main(
            f"sampling {count} images{others}: {image_sampler.options}, seed {args.seed}"
        )

        # The generator samples a batch when `write_images` asks for it. After an error the
        # generator is closed, which ends its progress bar.
        batches = [remaining[i] for i in processes.shard(len(remaining))]
        progress = processes.is_main and bool(batches)
        with closing(generate_batches(image_sampler, batches, frames, progress)) as generator:
            pairs = zip(batches, generator, strict=True)
            shown = write_images(args, pairs, folder, indices_on_disk, shown_count)

        # Single images are not collected: rank 0 waits for their files.
        if not args.individual:
            shown = [samples for part in processes.gather(shown) for samples in part]
        if processes.is_main:
            if args.individual:
                wait_for_images(folder, args.n)
                print(f"all {args.n} images exist, starting with {image_path(folder, 0)}")
            samples = Samples.concatenated(shown) if shown else None
            save_pictures(args.n, figures, samples, folder)


def write_images(
    args: argparse.Namespace,
    pairs: Iterable[tuple[range, Samples]],
    folder: Path,
    indices_on_disk: set[int],
    shown_count: int,
) -> list[Samples]:
    """Write the single images that are not on the disk, and return the batches that are shown.

    Each pair is a batch of indices and its samples. The batches that contain some of the first
    `shown_count` images are shown in the grid and the figures.
    """
    shown = []
    writes = []
    with ThreadPoolExecutor(4) as pool:
        for batch, samples in pairs:
            if args.individual:
                # This waits until the previous batch is on the disk, and raises its errors.
                list(writes)
                # Threads write this batch while the next one is sampled.
                images = to_uint8(samples.images).numpy()
                missing = [k for k, i in enumerate(batch) if i not in indices_on_disk]
                paths = [image_path(folder, batch[k]) for k in missing]
                writes = pool.map(save_image, images[missing], paths)
            if batch.start < shown_count:
                shown.append(samples)
        # This raises the errors of the last batch.
        list(writes)
    return shown


def sample_from_images(args: argparse.Namespace, image_sampler: ImageSampler, folder: Path) -> None:
    """Write the pictures that --interpolate, --variations and --inpaint ask for."""
    shape = image_sampler.shape

    def source_of(text):
        return int(text) if text.isdecimal() else read_image(Path(text), shape, args.fit)

    # All images are read before the folder is created. A picture's file name contains labels of its
    # sources, so that no picture of other sources is overwritten.
    rows = {}
    for kind, texts in (("interpolation", args.interpolate), ("variations", args.variations)):
        if texts:
            sources = [source_of(text) for text in texts]
            labels = map(label_of, texts, sources)
            rows["-".join([kind, *labels])] = sources
    if args.inpaint:
        image, mask = read_with_mask(args.inpaint, args.mask, shape)
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
            # The first two pictures are the image and its known pixels. The names of the other
            # files are not just numbers, because a file with such a name is a sample from noise,
            # which the manifest describes.
            for i, picture in enumerate(pictures[2:]):
                save_image(picture, folder / f"{inpainting}-{i:05d}.png")


def parse_flags(n: int, gif: bool) -> argparse.Namespace:
    """Read the command line. Raises UserError if the images do not fit in a grid."""
    parser = Parser(description=__doc__)
    add_sampling_flags(parser)
    parser.add_argument(
        "--n",
        "-n",
        type=positive,
        default=n,
        help="How many images to sample. With torchrun write -n, because torchrun reads --n as "
        "its own flag. Default: %(default)s.",
    )

    group = parser.add_argument_group("what to write in addition to the grid")
    group.add_argument(
        "--individual",
        action="store_true",
        help="Write a PNG file for each image, unless the file exists. Default: no.",
    )
    group.add_argument(
        "--strip",
        action="store_true",
        help="Draw a figure of the states x_t, from noise to images. Default: no.",
    )
    group.add_argument(
        "--progressive",
        action="store_true",
        help="Draw a figure of the model's estimates of x_0, from t = T down. Default: no.",
    )
    group.add_argument(
        "--gif",
        action=argparse.BooleanOptionalAction,
        default=gif,
        help="Write an animation of the grid, from noise to images. "
        "Default: no; yes in sampleFFHQ.py.",
    )

    group = parser.add_argument_group("what to do instead of sampling from noise")
    group.add_argument(
        "--interpolate",
        nargs=2,
        metavar=("A", "B"),
        help="Interpolate between two images: noise them, mix them and denoise. A and B are image "
        "files, or indices of images that this seed generates. Default: none.",
    )
    group.add_argument(
        "--variations",
        nargs=1,
        metavar="A",
        help="Vary an image: noise it and denoise it, several times. A is an image file, or the "
        "index of an image that this seed generates. Default: none.",
    )
    group.add_argument(
        "--depths",
        type=fractions,
        default="0.25,0.5,0.75,1",
        metavar="X,X,...",
        help="How far --interpolate and --variations noise the images, as fractions of all "
        "timesteps. Default: %(default)s.",
    )
    group.add_argument(
        "--fit",
        action="store_true",
        help="For --interpolate and --variations: crop and resize image files of another size. "
        "Default: no.",
    )
    group.add_argument(
        "--inpaint",
        metavar="IMAGE",
        help="Regenerate the part that is white in --mask (or transparent in IMAGE), --n times. "
        "This needs --sampler ddpm, or ddim with --eta 1. Default: none.",
    )
    group.add_argument(
        "--mask",
        metavar="FILE",
        help="For --inpaint: an image of equal size, white in the part to inpaint. Default: none.",
    )
    group.add_argument(
        "--resample",
        type=positive,
        default=10,
        metavar="N",
        help="For --inpaint: how many times each step is done. Default: %(default)s.",
    )
    group.add_argument(
        "--export",
        type=Path,
        metavar="FILE.safetensors|FOLDER",
        help="Write the EMA weights (of a run without EMA, the raw weights) as one file, or as a "
        "diffusers folder. Default: no.",
    )

    args = parser.parse_args()
    refuse_ignored(args, parser.parse_args([]))
    if args.n > GRID_LIMIT and (args.inpaint or not args.individual):
        # The grid of --inpaint shows all images, even with --individual.
        advice = "use a smaller --n" if args.inpaint else f"for {args.n} add --individual"
        raise UserError(f"a grid shows {GRID_LIMIT} images at most; {advice}")
    return args


def refuse_ignored(args: argparse.Namespace, defaults: argparse.Namespace) -> None:
    """Raise UserError for a flag that would be ignored and does not have its default value."""
    # An export does nothing else. The other actions can be combined.
    actions = [name for name in ACTION_FLAGS if getattr(args, name, None)]
    if args.export:
        actions = ["export"]
    effective = ALWAYS.union(actions, *(ACTION_FLAGS[action] for action in actions or ["noise"]))
    for name, value in vars(args).items():
        # Flags that are off, such as --no-gif, ask for nothing.
        if value and name not in effective and value != getattr(defaults, name):
            users = [action for action in ACTION_FLAGS if name in ACTION_FLAGS[action]]
            word = "with" if actions else "without"
            others = " or ".join(f"--{action}" for action in actions or users)
            raise UserError(f"--{name.replace('_', '-')} would be ignored {word} {others}")


def fractions(text: str) -> list[float]:
    """Parse a flag's value: comma-separated numbers from 0 to 1."""
    return [fraction(number) for number in text.split(",")]


if __name__ == "__main__":
    with exit_on_user_error():
        main()
