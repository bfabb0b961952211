"""Sample images from a trained model: `python sample.py` uses the newest run and writes a grid.

Without any run, it uses a model in pretrained/, which comes with the repository.

The network and its EMA weights come from the checkpoint, and no other file is needed. Images are
sampled from pure noise over all timesteps (Algorithm 2 of Ho et al. 2020), or in fewer steps with
--sampler and --steps. functions/samplers.py has the reverse loops. edit.py is the script for what
begins with images.

Several GPUs can divide many images among them. If this command is interrupted, starting it again
samples only the missing images:

    torchrun --nproc-per-node 8 sample.py -n 50000 --individual --out FOLDER
"""

import argparse
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

from data.pixels import to_uint8
from functions.sampling.calibration import with_calibration
from functions.sampling.export import export
from functions.sampling.files import (
    GRID_LIMIT,
    figures_of,
    image_path,
    open_folder,
    samples_folder,
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
from functions.sampling.options import add_sampling_flags
from functions.support.command_line import Parser, exit_on_user_error, positive
from functions.support.errors import UserError
from functions.support.pictures import save_image
from functions.support.processes import Processes, distributed

# These flags have an effect with --export.
EXPORT_FLAGS = {"export", "checkpoint", "runs", "device", "precision", "seed"}
# Earlier flags of this script, and what replaces them.
MOVED = {
    "--interpolate": "edit.py interpolate A B",
    "--variations": "edit.py vary A",
    "--inpaint": "edit.py inpaint A",
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
        if args.export:
            if processes.is_main:
                export(saved, image_sampler, args.export)
                print(f"wrote {args.export}")
            return

        # Both have no effect unless a flag asks for them. The calibration is first, because it is
        # fitted to the model alone; `with_guide` calibrates the guide.
        image_sampler = with_calibration(image_sampler, saved)
        image_sampler = with_guide(image_sampler, saved, processes)
        folder = samples_folder(args, saved, image_sampler, processes)
        # These facts determine the pixels, and are the same for all single images of a folder.
        facts = {
            "checkpoint": saved.digest,
            "weights": saved.kind,
            "seed": args.seed,
            **image_sampler.precision_facts,
            **image_sampler.options.facts(image_sampler.scheduler.timesteps),
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
        samples_of = generate_batches(image_sampler, batches, frames, progress, shown_count)
        with closing(samples_of) as generator:
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


def parse_flags(n: int, gif: bool) -> argparse.Namespace:
    """Read the command line.

    Raises UserError for a flag that has moved or would be ignored, and if the images do not fit in
    a grid.
    """
    for flag, command in MOVED.items():
        if any(text.startswith(flag) for text in sys.argv):
            raise UserError(f"{flag} is now a command of its own: python {command}")

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

    parser.add_argument(
        "--export",
        type=Path,
        metavar="FILE.safetensors|FOLDER",
        help="Instead of sampling, write the EMA weights (of a run without EMA, the raw weights) "
        "as one file, or as a diffusers folder. Default: no.",
    )

    args = parser.parse_args()
    defaults = parser.parse_args([])
    for name, value in vars(args).items():
        if args.export and name not in EXPORT_FLAGS and value != getattr(defaults, name):
            raise UserError(f"--{name.replace('_', '-')} would be ignored with --export")
    if args.n > GRID_LIMIT and not args.individual:
        raise UserError(f"a grid shows {GRID_LIMIT} images at most; for {args.n} add --individual")
    return args


if __name__ == "__main__":
    with exit_on_user_error():
        main()
