"""Sample images from a trained model: `python sample.py` uses the newest run and writes a grid.

Without any run, it draws people by the recipe pretrained/people.toml, which comes with the
repository. A recipe names models and settings (functions/sampling/settings.py).

The network and its EMA weights come from the checkpoint, and no other file is needed. Images are
sampled from pure noise over all timesteps (Algorithm 2 of Ho et al. 2020), or in fewer steps with
--sampler and --steps (functions/samplers.py).

Several GPUs can divide many images among them. If this command, with its --out, is interrupted,
starting it again samples only the batches with missing images:

    torchrun --nproc-per-node 8 sample.py -n 50000 --individual --out FOLDER
"""

if __name__ == "__main__":
    from functions.support.start import prepare

    prepare()

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.batches import batches_of
from data.pixels import to_uint8
from functions.sampling.generation import (
    Pipeline,
    generate,
    open_pipeline,
    sample_batch,
    step_bar,
)
from functions.sampling.samples_folder import (
    delete_leftovers,
    enlarged_pixels,
    generate_frames,
    image_indices,
    image_path,
    manifest_of,
    new_samples_folder,
    open_folder,
    save_gif,
)
from functions.sampling.settings import SeedFlags, add_sampling_flags, settings_of
from functions.saved.checkpoint import export
from functions.saved.loading import open_model
from functions.support import processes
from functions.support.command_line import Parser, run_script
from functions.support.errors import UserError
from functions.support.pictures import save_grid, save_image
from functions.support.settings import setting

# A grid has at most this many images.
GRID_LIMIT = 100


def main(name_prefix: str = "", description: str = __doc__, **defaults: Any) -> None:
    """Read the command line, sample, and print which files were written.

    `defaults` are those of flags, and --help begins with the description. Without RUN, the newest
    run whose name begins with `name_prefix` is used.
    """
    # Every process that torchrun starts executes all of this, but only rank 0 prints. The processes
    # divide single images among them; a grid alone is sampled by rank 0.
    with processes.connected():
        args = parse_flags(description, defaults)
        # The flags, or the recipe's settings with the given flags in their place
        config = settings_of(args, name_prefix)
        if args.export:
            saved, _ = open_model(Path(config.model), torch.device("cpu"))
            if processes.is_main():
                export(saved, args.export)
                print(f"{saved.path}: {saved}\nwrote {args.export}")
            return

        # The networks and their schedules come only from the checkpoints.
        pipeline = open_pipeline(args, config)
        folder = args.out or new_samples_folder(args.checkpoint, pipeline.models.saved)
        processes.on_main(delete_leftovers, folder)
        if args.individual:
            sample_files(args.indices, pipeline, folder)
        elif processes.is_main():
            sample_pictures(args, pipeline, folder)


def sample_pictures(args: Namespace, pipeline: Pipeline, folder: Path) -> None:
    """Sample the images, and write a grid and, if the flags ask for it, its animation."""
    indices = list(args.indices)
    manifest = manifest_of(pipeline)
    open_folder(folder, manifest, indices)
    print(f"sampling {len(indices)} images: {pipeline}")
    if args.gif:
        images, states, _ = generate_frames(pipeline, indices)
    else:
        images = generate(pipeline, indices, progress=True)
    # Another command may have opened the folder at the same moment.
    open_folder(folder, manifest, indices)
    if args.gif:
        # The last frame shows the details, too.
        frames = [enlarged_pixels(state, images.shape[-1]) for state in states.values()]
        save_gif([*frames[:-1], to_uint8(images)], folder / "denoising.gif")
        print(f"wrote {folder / 'denoising.gif'}")
    save_grid(to_uint8(images), folder / "grid.png")
    print(f"wrote {folder / 'grid.png'}")


def sample_files(indices: Sequence[int], pipeline: Pipeline, folder: Path) -> None:
    """Sample those images that are not in the folder, and write a PNG file of each.

    The processes share the batches, which depend neither on the number of processes nor on where
    an earlier command was interrupted. So the images are the same up to rounding.
    """
    manifest = manifest_of(pipeline)
    processes.on_main(open_folder, folder, manifest)
    on_disk = processes.on_main(image_indices, folder)
    batches = batches_of(indices, pipeline.batch_size)
    remaining = [batch for batch in batches if not on_disk.issuperset(batch)]
    processes.print_main(
        f"sampling {sum(map(len, remaining))} of {len(indices)} images into {folder}: {pipeline}"
    )

    shard = [remaining[i] for i in processes.shard(len(remaining))]
    with step_bar(pipeline, sum(map(len, shard)), processes.is_main()) as bar:
        for batch in shard:
            images = to_uint8(sample_batch(pipeline, batch, bar))
            # Another command may have opened the folder at the same moment.
            open_folder(folder, manifest)
            for i, image in zip(batch, images, strict=True):
                if i not in on_disk:
                    save_image(image, image_path(folder, i))

    processes.wait()
    processes.print_main(f"all {len(indices)} images are in {folder}")


@dataclass(frozen=True)
class SampleFlags(SeedFlags):
    """The flags of this script."""

    # How many images to sample. With torchrun write -n, because torchrun reads --n as its own flag.
    # Default: 36; in sampleFFHQ.py 20.
    n: int | None = setting(None, also=["-n"])
    # Sample the images of the seed with these indices, which count from 0. Default: the first N.
    indices: tuple[int, ...] = setting((), at_least=0)
    # The folder for the written files. An interrupted command that is started again with it goes
    # on. Default: a new folder in samples/ of the run, or here for a recipe.
    out: Path | None = None
    # Write a PNG file for each image, unless the file exists, and no grid or animation.
    individual: bool = False
    # Write an animation of the grid, from noise to images. In sampleFFHQ.py it is the default.
    gif: bool = False
    # Instead of sampling, write the EMA weights (of a run without EMA, the raw weights) as one
    # file, NAME.safetensors, or as a diffusers folder. A guide and the models of --enlarge are not
    # written. Default: no.
    export: Path | None = None


def parse_flags(description: str, defaults: dict) -> Namespace:
    """Read the command line. Raises UserError for more images than a grid shows."""
    parser = Parser(description=description)
    add_sampling_flags(parser, SampleFlags)
    usual = defaults.pop("n", 36)
    parser.set_defaults(**defaults)
    args = parser.parse_args()
    if args.n and args.indices:
        raise UserError("--indices: not allowed with --n")
    args.indices = args.indices or range(args.n or usual)
    count = len(args.indices)
    if count > GRID_LIMIT and not args.individual:
        raise UserError(f"a grid shows up to {GRID_LIMIT} images; for {count} add --individual")
    return args


if __name__ == "__main__":
    run_script(main)
