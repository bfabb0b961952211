"""The figures of `sample.py --interpolate` and `--variations`: one row a depth of noise."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from functions.sampling.fitting import BatchLimit
from functions.sampling.generation import ImageSampler, draw_batch, image_bar
from functions.sampling.latents import depth_of, interpolate_images, interpolate_seeds, variations
from functions.support.errors import UserError
from functions.support.pictures import save_strip

MIXTURES = 9  # from one end to the other
VARIATIONS = 8


@dataclass(frozen=True)
class Pixels:
    """What the scripts hand in of `data/`: image files and pixel ranges."""

    decode: Callable[[bytes], np.ndarray]  # a file's bytes -> uint8 (H, W, 3), at its own size
    fit: Callable[[np.ndarray, int], np.ndarray]  # to uint8 (S, S, 3)
    bad_image: type[Exception]  # what `decode` raises; its message is the reason
    to_model_range: Callable[[Tensor], Tensor]  # uint8 (B, H, W, C) -> (B, C, H, W) in [-1, 1]
    to_uint8: Callable[[Tensor], Tensor]


def is_number(text: str) -> bool:
    """Whether it stands for an image of the seed; otherwise it is a file."""
    return text.isdecimal()


def read_image(path: str, drawing: ImageSampler, pixels: Pixels, fit: bool) -> Tensor:
    """An image file as (C, H, W) in [-1, 1].

    Raises:
        UserError: there is no such file, it is no image, or not of the model's size, and `fit` is False.
    """
    try:
        rgb = pixels.decode(Path(path).read_bytes())
    except pixels.bad_image as error:
        raise UserError(f"{path}: {error}") from error
    except OSError as error:
        what = "an image is named by its file, or by its number (0, 1, ...) among those of the seed"
        raise UserError(f"{path}: {error.strerror}; {what}") from error
    size = drawing.shape[-1]
    height, width = rgb.shape[:2]
    if not fit and (height, width) != (size, size):
        raise UserError(
            f"{path} is {width}x{height} pixels, the model's images are {size}x{size}; --fit crops and resizes it"
        )
    return pixels.to_model_range(torch.from_numpy(pixels.fit(rgb, size))[None])[0].to(drawing.device)


def get_image(text: str, drawing: ImageSampler, pixels: Pixels, fit: bool) -> Tensor:
    """(C, H, W): a file's, or the image of that number, which is drawn."""
    if is_number(text):
        return draw_batch(drawing, [int(text)]).images[0].to(drawing.device)
    return read_image(text, drawing, pixels, fit)


def draw_interpolation(
    names: Sequence[str],
    depths: Sequence[float],
    batch_size: int,
    fit: bool,
    drawing: ImageSampler,
    pixels: Pixels,
    folder: Path,
) -> None:
    """interpolation.png: the two images at the ends, and between them their mixtures from the one to the other.

    As in the paper (`interpolate_images`), but for two images of the seed and a depth of all timesteps: they come from
    noise that is known, and so that is mixed (`interpolate_seeds`).
    """
    ends = torch.stack([get_image(name, drawing, pixels, fit) for name in names])
    weights = torch.linspace(0, 1, MIXTURES, device=drawing.device)

    def row(depth: float, some: Sequence[int]) -> Tensor:
        part = weights[list(some)]
        if depth == 1 and is_number(names[0]):
            return interpolate_seeds(drawing, [int(name) for name in names], part)
        return interpolate_images(drawing, ends, depth_of(depth, drawing.scheduler.timesteps), part)

    rows = draw_rows(row, depths, MIXTURES, batch_size, drawing, pixels)
    first, second = pixels.to_uint8(ends).cpu().numpy()
    beside = lambda image: np.repeat(image[None], len(rows), axis=0)
    titles = [label(names[0]), *(f"{weight:.3g}" for weight in weights.tolist()), label(names[1])]
    save(folder / "interpolation.png", [beside(first), *rows.swapaxes(0, 1), beside(second)], titles, depths, drawing)


def draw_variations(
    name: str, depths: Sequence[float], batch_size: int, fit: bool, drawing: ImageSampler, pixels: Pixels, folder: Path
) -> None:
    """variations.png: the image, and what comes back of it with other noise in each column."""
    x_0 = get_image(name, drawing, pixels, fit)
    row = lambda depth, some: variations(drawing, x_0, depth_of(depth, drawing.scheduler.timesteps), some)
    rows = draw_rows(row, depths, VARIATIONS, batch_size, drawing, pixels)
    image = pixels.to_uint8(x_0[None]).cpu().numpy()
    columns = [np.repeat(image, len(rows), axis=0), *rows.swapaxes(0, 1)]
    save(folder / "variations.png", columns, [label(name), *map(str, range(VARIATIONS))], depths, drawing)


def draw_rows(
    row: Callable[[float, Sequence[int]], Tensor],
    depths: Sequence[float],
    columns: int,
    batch_size: int,
    drawing: ImageSampler,
    pixels: Pixels,
) -> np.ndarray:
    """(depths, columns, H, W, C): `row(depth, columns)` for each depth, in parts that fit, with a bar."""
    fitting, rows = BatchLimit(drawing.device, batch_size), []
    with image_bar(len(depths) * columns) as bar:
        for depth in depths:
            parts = fitting.in_parts(lambda some, depth=depth: pixels.to_uint8(row(depth, some)).cpu(), range(columns))
            rows.append(torch.cat(parts).numpy())
            bar.update(columns)
    return np.stack(rows)


def save(
    path: Path, columns: Sequence[np.ndarray], titles: Sequence[str], depths: Sequence[float], drawing: ImageSampler
) -> None:
    """The figure, with the depths (in the paper's t, which is 0 for an image) beside it."""
    row_titles = [f"t = {depth_of(depth, drawing.scheduler.timesteps) + 1}" for depth in depths]
    save_strip(columns, titles, path, row_titles)
    print(f"wrote {path} ({drawing.settings})")


def label(name: str) -> str:
    """Over the column of an image: its number, or that it is a file."""
    return f"image {name}" if is_number(name) else "image"
