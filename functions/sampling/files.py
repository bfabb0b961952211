"""A folder of many single images, 00000.png and on, and pictures of several beside them.

Several processes may make the images, and an interrupted folder is finished by another start.

samples.json    the manifest, written first: all that decides the images' pixels, so that a folder
                holds images of one kind
00000.png       image 0, and so on; renamed into place, so that each is whole or not there
.lock           held by the process that makes them
"""

import argparse
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
from PIL import Image

from data.pixels import to_uint8
from functions.sampling.generation import Frame, Samples
from functions.support.errors import CheckpointError, UserError
from functions.support.files import read_json, short, write_text
from functions.support.pictures import save_gif, save_grid, save_strip
from functions.support.run_folder import locked

MANIFEST = "samples.json"
IMAGE_NAME = re.compile(r"([0-9]{5}|[1-9][0-9]{5,})\.png")
# A grid has at most this many images, an animation about this many frames.
MOST_IN_GRID = 100
GIF_FRAMES = 40
# A figure of the denoising has at most this many columns and rows.
STRIP_COLUMNS = 9
STRIP_ROWS = 6


def image_path(folder: Path, i: int) -> Path:
    return folder / f"{i:05d}.png"


def label_of(source: str, content: int | np.ndarray) -> str:
    """Name the source of a picture in the picture's file name.

    An image of the seed has its number, `content`. An image file, with these pixels, has the start
    of its name and a hash of them.
    """
    if isinstance(content, int):
        return str(content)
    # The start is short, so that the names of two files are a valid name together.
    digest = hashlib.sha256(content.tobytes()).hexdigest()
    return f"{short(Path(source).stem)[:30]}-{digest[:8]}"


def existing(folder: Path) -> set[int]:
    """Return the numbers of the images that a folder holds."""
    matches = map(IMAGE_NAME.fullmatch, os.listdir(folder))
    return {int(match[1]) for match in matches if match}


def check_manifest(folder: Path, facts: dict) -> None:
    """Raise UserError when the folder's images were made otherwise than `facts` say.

    Images without a manifest, or with a damaged one, are refused, too.
    """
    path = folder / MANIFEST
    if not path.exists():
        images = existing(folder)
        if not images:
            return
        first = image_path(folder, min(images)).name
        raise UserError(
            f"{folder} holds {first} but no {MANIFEST} to say what made it; take another --out"
        )
    try:
        manifest = read_json(path)
    except CheckpointError as error:
        raise UserError(f"{error}; nobody knows what images these are: delete it") from error
    changes = [
        f"{name} was {manifest.get(name)}, is now {facts.get(name)}"
        for name in {**facts, **manifest}
        if manifest.get(name) != facts.get(name)
    ]
    if changes:
        what = "; ".join(changes)
        raise UserError(f"{folder} holds images made otherwise ({what}); take another --out")


@contextmanager
def open_folder(folder: Path, facts: dict, individual: bool) -> Iterator[set[int]]:
    """Make the folder, or go on with it, and yield the numbers of the single images in it.

    With `individual` this process, the main one of several, holds the folder and writes the
    manifest: `facts`. Raises UserError as `check_manifest`, or when another process makes images
    in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Only single images are gone on with, so only for them is the folder locked.
    holding = nullcontext()
    if individual:
        holding = locked(folder, "making images", leftovers=".*.png.[0-9]*.tmp")
    with holding:
        check_manifest(folder, facts)
        if individual:
            write_text(folder / MANIFEST, json.dumps(facts, indent=2))
        yield existing(folder)


def figures_of(args: argparse.Namespace, times: Sequence[int]) -> dict[str, dict[str, Frame]]:
    """Return the figures of the denoising that the flags ask for, by the names of their files.

    A figure has the frame under each title. The times are those that the sampler visits; titles
    have the paper's t, which is 0 for an image.
    """
    calls = len(times) - 1
    figures = {}
    if args.gif:
        figures["denoising.gif"] = states(times, GIF_FRAMES)
    if args.strip:
        figures["strip.png"] = states(times, STRIP_COLUMNS)
    if args.progressive:
        # The calls are evenly spaced. The last is left out, as its x_0 is the image.
        columns = min(STRIP_COLUMNS - 1, max(calls - 1, 1))
        predicted = [round(i * (calls - 1) / columns) for i in range(columns)]
        figure = {f"t = {times[k] + 1}": ("x_0", k + 1) for k in predicted}
        figures["progressive.png"] = {**figure, "image": ("x", calls)}
    return figures


def states(times: Sequence[int], count: int) -> dict[str, Frame]:
    """Return states on the way from noise to image, the frame under each title.

    There are `count`, or fewer where two would be the same. They are denser at the end, where the
    image takes shape.
    """
    shares = [1 - (1 - i / (count - 1)) ** 1.5 for i in range(count)]
    steps = [round(share * (len(times) - 1)) for share in shares]
    return {f"t = {times[k] + 1}": ("x", k) for k in steps}


def save_pictures(
    n: int, figures: dict[str, dict[str, Frame]], samples: Samples | None, folder: Path
) -> None:
    """Write the grid of the first of `n` images and the figures of their denoising.

    Without `samples` the images are read from their files.
    """
    seen = min(n, MOST_IN_GRID)
    if samples:
        images = to_uint8(samples.images[:seen]).numpy()
    else:
        paths = [image_path(folder, i) for i in range(seen)]
        # An array takes the pixels at once, so that no file stays open.
        images = np.stack([np.asarray(Image.open(path)) for path in paths])
    save_grid(images, folder / "grid.png")
    print(f"wrote {folder / 'grid.png'}")

    for name, frame_of in figures.items():
        frames = [samples.frames[frame][:seen] for frame in frame_of.values()]
        if name.endswith(".gif"):
            save_gif(frames, folder / name)
        else:
            rows = [frame[:STRIP_ROWS] for frame in frames]
            save_strip(rows, list(frame_of), folder / name)
        print(f"wrote {folder / name}")
