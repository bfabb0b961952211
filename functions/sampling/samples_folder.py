"""Write samples into a folder: single images, and pictures that show several images.

The folder has these files:

samples.json    the manifest: all settings that determine the pixels, and the indices of the images
                in the pictures. It is written before the images.
00000.png       image 0, and so on. Each file is renamed into place, so that none is incomplete. A
                kill may leave a hidden one.
grid.png        and the other PICTURES, all of the same images
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from data.pixels import to_uint8
from functions.sampling.generation import Pipeline, generate
from functions.sampling.models import run_of
from functions.saved.checkpoint import SavedModel
from functions.saved.run_folder import is_recipe, new_folder
from functions.support import processes
from functions.support.errors import UserError, printable
from functions.support.files import read_json, write_text
from functions.support.pictures import grid_of

MANIFEST = "samples.json"
# These show several images. The manifest's SHOWN has their indices, or None without pictures.
PICTURES = ("grid.png", "denoising.gif")
SHOWN = "grid"
# An animation shows about this many steps.
RECORDED_STEPS = 40
# The frames of a denoising, uint8 (N, H, W, C) each. The keys are the paper's t, in descending
# order. The state at 0 is the final image, before it is enlarged.
Frames = dict[int, np.ndarray]


def results_folder(saved: SavedModel, kind: str) -> Path:
    """Return the folder for results of a kind: in a checkpoint's run, or in the working directory.

    That is the place for an exported file, for models of the box, and for those of diffusers.
    """
    return (run_of(saved.path) or Path()) / kind


def image_path(folder: Path, i: int) -> Path:
    return folder / f"{i:05d}.png"


def manifest_of(pipeline: Pipeline) -> dict[str, Any]:
    """Return all that determines the pixels of all samples in a folder."""
    saved = pipeline.models.saved
    return {
        "experiment": saved.provenance["experiment"],
        "checkpoint": saved.digest,
        "weights": saved.kind,
        # evaluate.py compares the images with the training images of this split.
        "split": saved.config["diffusion"].get("split", "reference"),
        **pipeline.settings,
    }


def new_samples_folder(run: Path, saved: SavedModel) -> Path:
    """Make the default folder for samples by RUN, whose name is the time, and return its path.

    It is in the run, or in the working directory.
    """
    if is_recipe(run):
        return processes.on_main(new_folder, Path("samples"), run.stem)
    name = "" if run_of(saved.path) else saved.name
    return processes.on_main(new_folder, results_folder(saved, "samples"), name)


def image_indices(folder: Path) -> set[int]:
    """Return the indices of the single images in a folder, as `image_path` names them.

    An empty file is no image.
    """
    return {
        int(path.stem)
        for path in folder.glob("*.png")
        if path.stem.isdecimal()
        and path == image_path(folder, int(path.stem))
        and path.stat().st_size
    }


def open_folder(folder: Path, settings: dict, shown: list[int] | None = None) -> None:
    """Make a folder for samples with these settings, or check that an existing one has them.

    `shown` are the indices of the images in pictures, or None for single images. Raises UserError
    for other settings or indices, and CheckpointError for samples without an intact manifest.
    """
    path = folder / MANIFEST
    settings = settings | {SHOWN: shown}
    text = json.dumps(settings, indent=2)
    folder.mkdir(parents=True, exist_ok=True)
    if not image_indices(folder) and not any(
        (folder / name).exists() for name in (MANIFEST, *PICTURES)
    ):
        write_text(path, text)
    elif json.dumps(earlier := read_json(path), indent=2) != text:
        now = json.loads(text)
        changes = [
            f"{name} was {printable(earlier.get(name))}, is now {printable(now.get(name))}"
            for name in now | earlier
            if earlier.get(name) != now.get(name)
        ]
        raise UserError(
            f"{folder} is for samples of other settings ({'; '.join(changes)}); use another --out"
        )


def generate_frames(pipeline: Pipeline, indices: Sequence[int]) -> tuple[Tensor, Frames, Frames]:
    """Sample the images with these indices, and record about RECORDED_STEPS evenly spaced steps.

    Returns the images (N, C, H, W) in [-1, 1], and each enlarger doubles H and W; the noise and
    the states; the estimates of x_0.
    """
    times = pipeline.times
    # The last step and the image are always recorded.
    recorded = {*times[:: math.ceil(pipeline.step_count / RECORDED_STEPS)], *times[-2:]}
    states = defaultdict(list)
    estimates = defaultdict(list)
    # Each image begins as noise, which depends only on the seed and the image's index.
    x_T = pipeline.noise(indices)()
    states[pipeline.scheduler.timesteps].append(to_uint8(x_T))

    def on_step(k, t, x, x_0):
        for frames, at, images in ((estimates, t, x_0), (states, times[k + 1], x)):
            if at in recorded:
                frames[at + 1].append(to_uint8(images))

    # Each batch of images calls `on_step` for all steps.
    images = generate(pipeline, indices, progress=True, on_step=on_step)
    states, estimates = (
        {t: np.concatenate(parts) for t, parts in frames.items()} for frames in (states, estimates)
    )
    return images, states, estimates


def enlarged_pixels(images: np.ndarray, size: int) -> np.ndarray:
    """Return images (N, H, W, C) at `size`, a multiple of theirs: each pixel becomes a square."""
    factor = size // images.shape[1]
    return images.repeat(factor, axis=1).repeat(factor, axis=2)


def save_gif(frames: Iterable[np.ndarray], path: Path, columns: int | None = None) -> None:
    """Write an animated GIF. Each frame is the grid of one batch, (N, H, W, C)."""
    grids = [grid_of(frame, columns) for frame in frames]
    # All frames share the palette of the last frame, so that colours do not flicker.
    palette = grids[-1].quantize(256)
    first, *others = [grid.quantize(palette=palette, dither=Image.Dither.NONE) for grid in grids]
    # The durations are in milliseconds: about 12 frames per second. loop=0 repeats it forever.
    durations = [80] * len(others) + [2000]
    first.save(path, save_all=True, append_images=others, duration=durations, loop=0)
