"""Draw grids of images, and write pictures. Images are uint8 (N, H, W, C), RGB or grey."""

import math
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


def save_figure(figure: Figure, path: Path) -> None:
    """Write a matplotlib figure as a PNG, without empty margins."""
    # A Figure that is not made by pyplot needs no screen, and no backend is chosen for the user.
    figure.savefig(path, dpi=130, bbox_inches="tight", pad_inches=0.05)
