"""Sample images from a trained model, by default the newest run: write a grid.

Without any run, it draws people by the recipe pretrained/people.toml, which
comes with the repository. A recipe names models and settings
(functions/sampling/settings.py).

The network and its EMA weights come from the checkpoint, and no other file is
needed. Images are sampled from pure noise over all timesteps (Algorithm 2 of
Ho et al. 2020), or in fewer steps with --sampler and --steps
(functions/samplers.py).

Several GPUs can divide many images among them. If this command, with its
--out, is interrupted, starting it again samples only the batches with missing
images:

    torchrun --nproc-per-node 8 sample.py -n 50000 --individual --out FOLDER

RUN comes before the flags: a run folder, a checkpoint, an exported file, or a
diffusers folder or its name. Or a recipe, whose settings are then the
defaults, and of which --export writes the model alone.
"""

if __name__ == "__main__":
    from functions.support.start import prepare

    prepare()

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.pixels import to_uint8
from functions.sampling.export import export
from functions.sampling.generation import (
    Pipeline,
    generate,
    open_pipeline,
    sample_batch,
    step_bar,
)
from functions.sampling.samples_folder import (
    enlarged_pixels,
    generate_frames,
    image_indices,
    image_path,
    manifest_of,
    new_samples_folder,
    open_folder,
    save_gif,
)
from functions.sampling.settings import SamplingFlags, default_settings, find_run
from functions.saved.checkpoint import load_model
from functions.support import processes
from functions.support.command_line import read_flags, run_script, split_words
from functions.support.pictures import save_grid, save_image
from functions.support.processes import batches_of
from functions.support.settings import ConfigError, setting

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
        [run], words = split_words("[RUN]", sys.argv[1:])
        run = find_run(run, words, name_prefix)
        # The flags begin with the recipe's settings, if RUN is one.
        flags = SampleFlags(sampling=default_settings(run), **defaults)
        flags = read_flags(flags, words, "[RUN]", description)
        if flags.export:
            saved = load_model(Path(flags.sampling.model))
            if processes.is_main():
                export(saved, flags.export)
                print(f"{saved.path}: {saved}\nwrote {flags.export}")
            return

        # The networks and their schedules come only from the checkpoints.
        pipeline = open_pipeline(flags)
        folder = flags.out or new_samples_folder(run, pipeline.models.saved)
        indices = flags.indices or range(flags.n)
        if flags.individual:
            sample_files(indices, pipeline, folder)
        elif processes.is_main():
            sample_pictures(indices, pipeline, folder, flags.gif)


def sample_pictures(
    indices: Sequence[int], pipeline: Pipeline, folder: Path, is_animated: bool
) -> None:
    """Sample the images, and write a grid and, if it is to be animated, an animation."""
    indices = list(indices)
    open_folder(folder, manifest_of(pipeline), indices)
    print(f"sampling {len(indices)} images: {pipeline}")
    if is_animated:
        images, states, _ = generate_frames(pipeline, indices)
        # The last frame shows the details, too.
        frames = [enlarged_pixels(state, images.shape[-1]) for state in states.values()]
        save_gif([*frames[:-1], to_uint8(images)], folder / "denoising.gif")
        print(f"wrote {folder / 'denoising.gif'}")
    else:
        images = generate(pipeline, indices, progress=True)
    save_grid(to_uint8(images), folder / "grid.png")
    print(f"wrote {folder / 'grid.png'}")


def sample_files(indices: Sequence[int], pipeline: Pipeline, folder: Path) -> None:
    """Sample those images that are not in the folder, and write a PNG file of each.

    The processes share the batches, which depend neither on the number of processes nor on where
    an earlier command was interrupted. So the images are the same up to rounding.
    """
    processes.on_main(open_folder, folder, manifest_of(pipeline))
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
            for i, image in zip(batch, images, strict=True):
                if i not in on_disk:
                    save_image(image, image_path(folder, i))

    processes.wait()
    processes.print_main(f"all {len(indices)} images are in {folder}")


@dataclass(frozen=True, kw_only=True)
class SampleFlags(SamplingFlags):
    """The flags of this script."""

    # How many images to sample. With torchrun write -n, because torchrun reads --n as its own flag.
    n: int = 36
    # Sample the images of the seed with these indices, which count from 0, instead of the first N.
    indices: tuple[int, ...] = setting((), at_least=0)
    # The folder for the written files. An interrupted command that is started again with it goes
    # on. None: a new folder in samples/ of the run, or here for a recipe.
    out: Path | None = None
    # Write a PNG file for each image, unless the file exists, and no grid or animation.
    individual: bool = False
    # Write an animation of the grid, from noise to images.
    gif: bool = False
    # Instead of sampling, write the EMA weights (of a run without EMA, the raw weights) as one
    # file, NAME.safetensors, or as a diffusers folder. A guide and the models of --enlarge are not
    # written.
    export: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        count = len(self.indices) or self.n
        if count > GRID_LIMIT and not self.individual:
            raise ConfigError(
                f"a grid shows up to {GRID_LIMIT} images; for {count} add --individual"
            )


if __name__ == "__main__":
    run_script(main)
