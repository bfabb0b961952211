"""Decode image files of any colour mode to RGB or grey, or report why they cannot be used."""

import errno
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from data.pixels import picture_of
from functions.support.errors import UserError, printable

# By default Pillow tries dozens of other formats too. No data set uses these, and Pillow runs other
# programs to read some of them.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")


class BadImage(UserError):
    """An image, or a file of several, cannot be used. The message gives the reason."""


@contextmanager
def parsing(problem: str) -> Iterator[None]:
    """Raise BadImage for a library's error about the data that it parses in this context.

    Errors of the disk and of memory are raised as they are. So are those of a line in data/ or
    extras/ itself, such as a call that is misspelt.
    """
    try:
        yield
    except Exception as error:
        *_, (frame, _) = walk_tb(error.__traceback__)
        is_own = Path(frame.f_code.co_filename).parent.parent == Path(__file__).parent.parent
        # An error of the disk has a number. That of a damaged file has none, or the one for a place
        # that no file has.
        is_of_disk = getattr(error, "errno", None) not in (None, errno.EINVAL)
        if is_own or is_of_disk or isinstance(error, MemoryError):
            raise
        raise BadImage(f"{problem} ({type(error).__name__}: {printable(error)})") from error


def open_image(data: bytes) -> Image.Image:
    """Decode the bytes of an image of FORMATS, and turn it upright by its EXIF orientation.

    Of an animation, the first frame is decoded. Raises BadImage for an image that is truncated,
    corrupt, larger than Pillow's limit of 179 million pixels, or none.
    """
    with parsing("cannot be decoded"):
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError as error:
            reason = f"not a {', '.join(FORMATS)} image" if data else "empty file"
            raise BadImage(reason) from error
        image.load()
        return ImageOps.exif_transpose(image)


def to_pixels(image: Image.Image, channels: int) -> np.ndarray:
    """Convert a Pillow image of any mode -> uint8 (H, W, channels), RGB or grey.

    Alpha is composited over white. Of 16-bit colour, Pillow keeps the high byte. Colour profiles
    are ignored.
    """
    if image.mode.startswith("I"):
        # convert("RGB") would clip 16-bit grey. Here its values, at most 65535, are divided by
        # 65535 / 255 = 257 and rounded to the nearest level.
        values = np.asarray(image, np.int32)
        levels = (values + 128) // 257
        return np.repeat(np.uint8(levels)[..., None], channels, axis=2)

    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    # Pillow's grey is the luma of ITU-R BT.601.
    pixels = np.array(image.convert("L" if channels == 1 else "RGB"))
    return pixels.reshape(image.height, image.width, channels)


def fit_square(pixels: np.ndarray, image_size: int) -> np.ndarray:
    """Crop the longer side at both ends, and resize uint8 (H, W, C) or (H, W) -> (S, S, C), (S, S).

    S is image_size in pixels. An S x S square is returned unchanged.
    """
    height, width = pixels.shape[:2]
    side = min(height, width)
    top = (height - side) // 2
    left = (width - side) // 2
    square = np.ascontiguousarray(pixels[top : top + side, left : left + side])
    if side == image_size:
        return square

    # An image that shrinks needs antialiasing, which Lanczos does.
    resample = Image.LANCZOS if side > image_size else Image.BICUBIC
    resized = picture_of(square).resize((image_size, image_size), resample)
    return np.array(resized).reshape(image_size, image_size, *pixels.shape[2:])
