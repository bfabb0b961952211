"""A folder of many single images, 00000.png and on: made by several processes, and finished when it was interrupted.

samples.json    the manifest, written first: all that decides the images' pixels. A folder holds images of one kind.
00000.png       image 0, and so on; renamed into place, so that each is whole or not there
.lock           held by the process that makes them
"""

import argparse
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
from PIL import Image

from data.pixels import to_uint8
from functions.sampling.generation import Frame, Samples, frame_steps
from functions.support.errors import UserError
from functions.support.files import write_text
from functions.support.pictures import save_gif, save_grid, save_strip
from functions.support.run_folder import locked

MANIFEST = "samples.json"
IMAGE_NAME = re.compile(r"([0-9]{5}|[1-9][0-9]{5,})\.png")
MOST_IN_GRID, GIF_FRAMES, STRIP_COLUMNS, STRIP_ROWS = 100, 40, 9, 6


def image_path(folder: Path, i: int) -> Path:
    return folder / f"{i:05d}.png"


def existing(folder: Path) -> set[int]:
    """The numbers of the images that are there."""
    return {int(match[1]) for match in map(IMAGE_NAME.fullmatch, os.listdir(folder)) if match}


def check_manifest(folder: Path, facts: dict) -> None:
    """`UserError` when the folder's images were made otherwise than `facts` say, or nothing says how."""
    try:
        found = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError as error:
        if there := existing(folder):
            what = f"{image_path(folder, min(there)).name} but no {MANIFEST} to say what made it"
            raise UserError(f"{folder} holds {what}; take another --out") from error
        return
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{folder / MANIFEST}: damaged, so nobody knows what images these are; delete it"
        ) from error
    found = found if isinstance(found, dict) else {}
    differing = [name for name in {**facts, **found} if found.get(name) != facts.get(name)]
    if differing:
        what = "; ".join(
            f"{name} was {found.get(name)}, is now {facts.get(name)}" for name in differing
        )
        raise UserError(f"{folder} holds images made otherwise ({what}); take another --out")


@contextmanager
def open_folder(folder: Path, facts: dict, individual: bool) -> Iterator[set[int]]:
    """Make the folder, or go on with it, and yield the numbers of the single images that are there.

    With `individual` it is held for this process, the main one of several, and the manifest written: `facts`.
    Raises UserError as `check_manifest`, or when another process makes images in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (
        locked(folder, "making images", leftovers=".*.png.[0-9]*.tmp")
        if individual
        else nullcontext()
    ):
        check_manifest(folder, facts)
        if individual:
            write_text(folder / MANIFEST, json.dumps(facts, indent=2))
        yield existing(folder)


def figures_of(args: argparse.Namespace, times: Sequence[int]) -> dict[str, dict[str, Frame]]:
    """The figures of the denoising that the flags ask for: by their files' names, the frame under each title."""
    # The paper's t, which is 0 for an image
    calls, title = len(times) - 1, lambda t: f"t = {t + 1}"
    states = lambda count: {title(times[k]): ("x", k) for k in frame_steps(calls, count)}
    figures = {}
    if args.gif:
        figures["denoising.gif"] = states(GIF_FRAMES)
    if args.strip:
        figures["strip.png"] = states(STRIP_COLUMNS)
    if args.progressive:
        # Evenly spaced, without the last, whose x_0 is the image
        columns = min(STRIP_COLUMNS - 1, max(calls - 1, 1))
        predicted = [1 + round(i * (calls - 1) / columns) for i in range(columns)]
        figures["progressive.png"] = {title(times[k - 1]): ("x_0", k) for k in predicted} | {
            "image": ("x", calls)
        }
    return figures


def save_pictures(
    n: int, figures: dict[str, dict[str, Frame]], samples: Samples | None, folder: Path
) -> None:
    """Write the grid of the first images and the figures of their denoising; without `samples` the images are files."""
    seen = min(n, MOST_IN_GRID)
    if samples:
        images = to_uint8(samples.images[:seen]).numpy()
    else:
        images = np.stack([np.asarray(Image.open(image_path(folder, i))) for i in range(seen)])
    save_grid(images, folder / "grid.png")
    print(f"wrote {folder / 'grid.png'}")
    for name, frame_of in figures.items():
        frames = [samples.frames[frame][:seen] for frame in frame_of.values()]
        if name.endswith(".gif"):
            save_gif(frames, folder / name)
        else:
            save_strip([frame[:STRIP_ROWS] for frame in frames], list(frame_of), folder / name)
        print(f"wrote {folder / name}")
