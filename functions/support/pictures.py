"""Pictures: grids, animations and strips of images. Images are uint8 (N, H, W, 3)."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image
from torchvision.utils import make_grid

matplotlib.use("Agg")  # plots into files; a run on a server has no screen
import matplotlib.pyplot as plt

from functions.support.files import write_whole

SMALLEST_SIDE = 96  # pixels; smaller images are enlarged in grids, where they are to be looked at
GAP = 2  # white pixels between images, before enlarging


def grid_of(images: np.ndarray, columns: int | None = None) -> Image.Image:
    """All images in rows with white gaps, about square unless columns are given.

    Small ones are enlarged by the whole number that brings them to SMALLEST_SIDE.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    batch = torch.from_numpy(images).permute(0, 3, 1, 2)
    grid = Image.fromarray(
        make_grid(batch, nrow=columns, padding=GAP, pad_value=255).permute(1, 2, 0).numpy()
    )
    factor = math.ceil(SMALLEST_SIDE / images.shape[1])
    return grid.resize((grid.width * factor, grid.height * factor), Image.Resampling.BICUBIC)


def save_image(image: np.ndarray | Image.Image, path: Path) -> None:
    """One image as a PNG, with exactly its pixels."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    write_whole(path, lambda file: image.save(file, "PNG"))


def save_grid(images: np.ndarray, path: Path, columns: int | None = None) -> Image.Image:
    """Write a PNG of all images in rows, small ones enlarged, and return it."""
    grid = grid_of(images, columns)
    save_image(grid, path)
    return grid


def save_gif(frames: Sequence[np.ndarray], path: Path, columns: int | None = None) -> None:
    """An animated GIF of grids, one (N, H, W, 3) batch a frame, 12 a second; the last stays for two seconds.

    All frames share the palette of the last one, so that colours do not flicker.
    """
    pictures = [grid_of(frame, columns) for frame in frames]
    palette = pictures[-1].quantize(256)
    first, *others = [
        picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures
    ]
    animation = {
        "save_all": True,
        "append_images": others,
        "duration": [80] * len(others) + [2000],
        "loop": 0,
    }
    write_whole(path, lambda file: first.save(file, "GIF", **animation))


def save_strip(
    frames: Sequence[np.ndarray], titles: Sequence[str], path: Path, row_titles: Sequence[str] = ()
) -> None:
    """A figure with a row a sample and a column a frame (N, H, W, 3); titles are above, `row_titles` at the left."""
    rows, columns = len(frames[0]), len(frames)
    left, top = 0.75 if row_titles else 0.0, 0.3  # inches, for the titles
    width, height = 1.1 * columns + left, 1.1 * rows + top
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False)
    for column, (frame, title) in enumerate(zip(frames, titles, strict=True)):
        axes[0, column].set_title(title, fontsize=9)
        for row in range(rows):
            axes[row, column].imshow(frame[row], interpolation="bicubic")
            axes[row, column].axis("off")
    for row, title in enumerate(row_titles):
        axes[row, 0].text(
            -0.08, 0.5, title, fontsize=9, ha="right", va="center", transform=axes[row, 0].transAxes
        )
    figure.subplots_adjust(left / width + 0.005, 0.005, 0.995, 1 - top / height, 0.04, 0.04)
    save_figure(figure, path)


def save_figure(figure: plt.Figure, path: Path) -> None:
    """A matplotlib figure as a PNG; closes it."""
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=130))
    plt.close(figure)
