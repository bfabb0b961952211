"""Read a picture that a user names, and fit it and its mask to a model."""

from pathlib import Path

import numpy as np
from PIL import Image

from data.decode import BadImage, fit_square, open_image, to_pixels
from functions.support.errors import UserError


def fit_image(image: Image.Image, shape: tuple[int, int, int]) -> np.ndarray:
    """Convert, crop and resize a Pillow image to a model's `shape` (C, S, S) -> uint8 (S, S, C)."""
    channels, image_size, _ = shape
    return fit_square(to_pixels(image, channels), image_size)


def open_image_file(path: Path | str, hint: str = "") -> Image.Image:
    """Read one image file. Raises UserError, which ends with `hint` if the file cannot be read."""
    try:
        return open_image(Path(path).read_bytes())
    except BadImage as error:
        raise UserError(f"{path}: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}{hint}") from error


def fit_mask(mask: np.ndarray, image_size: int) -> np.ndarray:
    """Crop and resize a mask, bool (H, W), as `fit_square` does with its image -> bool (S, S)."""
    # The mask may cover a resized pixel only in part. The pixel is inpainted if the mask covers
    # more than a tenth of it.
    return fit_square(np.uint8(255) * mask, image_size) > 25
