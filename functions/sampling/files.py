"""Write samples into a folder: single images, and pictures that show several images.

Several processes may divide the single images among them. After an interruption, the same command
adds the missing images. The folder has these files:

samples.json    the manifest: all facts that determine the pixels of the single images. It is
                written before the images.
00000.png       image 0, and so on. Each file is renamed into place, so that none is incomplete.
.lock           the lock of the process that writes the single images
"""

import argparse
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from data.pixels import to_uint8
from functions.sampling.generation import FrameKey, ImageSampler, Samples
from functions.support.checkpoint import SavedModel
from functions.support.errors import CheckpointError, UserError
from functions.support.files import read_json, write_text
from functions.support.pictures import save_gif, save_grid, save_strip
from functions.support.processes import Processes
from functions.support.run_folder import locked, results_folder

MANIFEST = "samples.json"
IMAGE_NAME = re.compile(r"([0-9]{5}|[1-9][0-9]{5,})\.png")
# A grid has at most this many images.
GRID_LIMIT = 100
# An animation has about this many frames.
GIF_FRAMES = 40
# A figure of the denoising has at most this many columns and rows.
STRIP_COLUMNS = 9
STRIP_ROWS = 6


def image_path(folder: Path, i: int) -> Path:
    return folder / f"{i:05d}.png"


def samples_folder(
    args: argparse.Namespace, saved: SavedModel, image_sampler: ImageSampler, processes: Processes
) -> Path:
    """Return the folder for what is sampled: --out, or a folder in the model's run.

    Its name contains the options of the sampler, the precision and the seed.
    """
    if args.out:
        return args.out
    options = image_sampler.options.facts.values()
    precision = image_sampler.precision_facts["precision"]
    words = [saved.name, *options, precision, f"seed{args.seed}"]
    return processes.on_main(lambda: results_folder(saved, "samples")) / "-".join(map(str, words))


def image_indices(folder: Path) -> set[int]:
    """Return the indices of the single images in a folder."""
    matches = map(IMAGE_NAME.fullmatch, os.listdir(folder))
    return {int(match[1]) for match in matches if match}


def check_manifest(folder: Path, facts: dict) -> None:
    """Raise UserError unless the folder's images were sampled with the same facts.

    Images without a manifest, or with a damaged one, are also refused.
    """
    path = folder / MANIFEST
    if not path.exists():
        indices = image_indices(folder)
        if not indices:
            return
        first = image_path(folder, min(indices)).name
        raise UserError(
            f"{folder} has {first}, but no {MANIFEST} with its settings; use another --out"
        )
    try:
        manifest = read_json(path)
    except CheckpointError as error:
        raise UserError(
            f"{error}; the settings of the images there are unknown, so use another --out"
        ) from error
    changes = [
        f"{name} was {manifest.get(name)}, is now {facts.get(name)}"
        for name in {**facts, **manifest}
        if manifest.get(name) != facts.get(name)
    ]
    if changes:
        raise UserError(
            f"{folder} has images with other settings ({'; '.join(changes)}); use another --out"
        )


@contextmanager
def open_folder(folder: Path, facts: dict) -> Iterator[set[int]]:
    """Lock a folder for single images, and yield the indices of those that are in it.

    It is created if it does not exist, and `facts` become its manifest. Only rank 0 may enter the
    context. Raises UserError when another process has locked the folder, and for the reasons of
    `check_manifest`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, "making images", leftovers=[".[0-9]*.png.*.tmp"]):
        check_manifest(folder, facts)
        write_text(folder / MANIFEST, json.dumps(facts, indent=2))
        yield image_indices(folder)


def read_images(folder: Path, n: int) -> np.ndarray:
    """Read the single images 0 .. n-1: uint8 (N, H, W, C)."""
    # np.asarray reads the pixels immediately, so that no file stays open.
    images = np.stack([np.asarray(Image.open(image_path(folder, i))) for i in range(n)])
    # Grey images are read as (N, H, W).
    return images.reshape(*images.shape[:3], -1)


def figures_of(
    args: argparse.Namespace, image_sampler: ImageSampler
) -> dict[str, dict[str, FrameKey]]:
    """Return {file name: figure} for the denoising figures that the flags ask for.

    A figure is {title: key of a frame}. The titles give the paper's t, which is 0 for the final
    image.
    """
    calls = image_sampler.step_count
    figures = {}
    if args.gif:
        figures["denoising.gif"] = state_frames(image_sampler, GIF_FRAMES)
    if args.strip:
        figures["strip.png"] = state_frames(image_sampler, STRIP_COLUMNS)
    if args.progressive:
        # The figure has the x_0 of evenly spaced network calls. It leaves out the last call,
        # because its x_0 is the final image.
        columns = min(STRIP_COLUMNS - 1, max(calls - 1, 1))
        steps = [round(i * (calls - 1) / columns) for i in range(columns)]
        figure = {f"t = {image_sampler.times[k] + 1}": ("x_0", k + 1) for k in steps}
        figures["progressive.png"] = {**figure, "image": ("x", calls)}
    return figures


def state_frames(image_sampler: ImageSampler, count: int) -> dict[str, FrameKey]:
    """Return {title: key of a frame} for `count` states from noise to image.

    If two frames would be the same, only one is returned. The frames are denser near the end, where
    the image takes shape.
    """
    times = image_sampler.times
    shares = [1 - (1 - i / (count - 1)) ** 1.5 for i in range(count)]
    steps = [round(share * image_sampler.step_count) for share in shares]
    return {f"t = {times[k] + 1}": ("x", k) for k in steps}


def save_pictures(samples: Samples, figures: dict[str, dict[str, FrameKey]], folder: Path) -> None:
    """Write the grid of the images, and the figures of their denoising."""
    save_grid(to_uint8(samples.images).numpy(), folder / "grid.png")
    print(f"wrote {folder / 'grid.png'}")
    for name, figure in figures.items():
        frames = [samples.frames[key] for key in figure.values()]
        if name.endswith(".gif"):
            save_gif(frames, folder / name)
        else:
            rows = [frame[:STRIP_ROWS] for frame in frames]
            save_strip(rows, list(figure), folder / name)
        print(f"wrote {folder / name}")
