"""Draw grids, animations and strips of images. Images are uint8 (N, H, W, C), RGB or grey."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from data.pixels import picture_of
from functions.support.files import replacing

# In grids, images with a shorter side than this (in pixels) are enlarged, so that they can be seen.
MIN_SIDE = 96
# The gap between two images has this width in pixels, before the grid is enlarged.
GAP = 2


def grid_of(images: np.ndarray, columns: int | None = None) -> Image.Image:
    """Return a picture of all images in rows, with white gaps. By default it is about square.

    Of their channels, the first three are shown, or the first one if there are two. Images with a
    side below MIN_SIDE are enlarged by an integer factor.
    """
    images = images[..., : 3 if images.shape[3] >= 3 else 1]
    # This import takes two seconds, and it also imports PyTorch's compiler.
    from torchvision.utils import make_grid

    columns = columns or math.ceil(math.sqrt(len(images)))
    batch = torch.from_numpy(images).permute(0, 3, 1, 2)  # (N, C, H, W)
    grid = make_grid(batch, nrow=columns, padding=GAP, pad_value=255)
    # torchvision repeats grey to three channels.
    grid = grid[: images.shape[3]]
    picture = picture_of(grid.permute(1, 2, 0).numpy())
    factor = math.ceil(MIN_SIDE / images.shape[1])
    # By default `scale` is bicubic.
    return ImageOps.scale(picture, factor)


def save_image(image: np.ndarray, path: Path) -> None:
    """Write one image, (H, W, C) or grey (H, W), as a PNG."""
    with replacing(path) as temporary:
        picture_of(image).save(temporary, "PNG")


def save_grid(images: np.ndarray, path: Path, columns: int | None = None) -> Image.Image:
    """Write the picture of `grid_of` as a PNG, and return the picture."""
    grid = grid_of(images, columns)
    save_image(np.asarray(grid), path)
    return grid


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


def save_strip(columns: dict[str, np.ndarray], path: Path, row_titles: Sequence[str] = ()) -> None:
    """Draw a figure of columns of images, {title: (N, H, W, C)}, with titles left of the rows."""
    # The images fill the figure, 1.1 inches each. `save_figure` adds room for the titles.
    rows = len(next(iter(columns.values())))
    figure = Figure(figsize=(1.1 * len(columns), 1.1 * rows))
    figure.subplots_adjust(left=0, bottom=0, right=1, top=1, wspace=0.04, hspace=0.04)
    no_frame = {"xticks": [], "yticks": [], "frame_on": False}
    axes = figure.subplots(rows, len(columns), squeeze=False, subplot_kw=no_frame)

    for column, (title, images) in zip(axes.T, columns.items(), strict=True):
        column[0].set_title(title, fontsize=9)
        for ax, image in zip(column, images, strict=True):
            # The colour map and its range are only used for grey.
            ax.imshow(image, "gray", vmin=0, vmax=255, interpolation="bicubic")
    for ax, title in zip(axes[:, 0], row_titles, strict=False):
        ax.set_ylabel(title, fontsize=9, rotation=0, ha="right", va="center")
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a matplotlib figure as a PNG, without empty margins."""
    # A Figure that is not made by pyplot needs no screen, and no backend is chosen for the user.
    figure.savefig(path, dpi=130, bbox_inches="tight", pad_inches=0.05)
