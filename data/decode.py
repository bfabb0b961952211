"""One image file's bytes -> uint8 RGB pixels, whatever its colour mode; or the reason why it cannot be used."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from functions.support.errors import UserError

from .archives import printable

# Named one by one: Pillow otherwise also tries dozens of formats that no image set uses, some of them by calling
# other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")

# What Pillow and the libraries below it raise on broken bytes (type, struct and key errors and the like come from its
# own parsing of headers and EXIF).
_DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    struct.error,
    zlib.error,
    IndexError,
    KeyError,
    OverflowError,
    NotImplementedError,
)


class BadImage(UserError):
    """An image that cannot be used; the message is the reason, without the file's name."""


def decode_rgb(data: bytes) -> np.ndarray:
    """The bytes of a PNG, JPEG, WebP or BMP -> uint8 (H, W, 3) at the file's own size.

    Turned upright by its EXIF orientation; alpha and transparent colours are composited over white; grey, palette and
    CMYK become RGB; 16-bit grey is scaled to 8 bits (of 16-bit colour Pillow keeps the high byte: at most one level
    off). Embedded colour profiles are ignored. Raises BadImage for anything animated, truncated, corrupt, too large
    (Pillow's decompression-bomb limit, 89 million pixels) or not an image. A JPEG whose middle is damaged can decode
    without complaint, in which case nothing here can tell; inside a zip its checksum does.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.format == "PNG":
                    image.verify()  # the checksums of its chunks: load() passes over those of the pixels
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                # An MPO is a photo with previews behind it, not an animation.
                if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
                    raise BadImage(f"animated ({image.n_frames} frames)")
                image.load()
                image = ImageOps.exif_transpose(image)
                return _convert_to_rgb(image)
    except BadImage:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise BadImage("too many pixels (a decompression bomb?)") from None
    except UnidentifiedImageError:
        raise BadImage("empty file" if not data else f"not a {', '.join(FORMATS)} image") from None
    except _DECODING_ERRORS as error:
        raise BadImage(f"broken file ({type(error).__name__}: {printable(error)})") from None


def _convert_to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int32)
        levels = (grey + 128) // 257  # 65535 / 255 = 257, rounded to nearest: scaled, where convert("RGB") would clip
        if "transparency" in image.info:
            levels[grey == image.info["transparency"]] = 255
        return np.repeat(levels.clip(0, 255).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"))


def fit_square(rgb: np.ndarray, image_size: int) -> np.ndarray:
    """uint8 (H, W, 3) -> uint8 (S, S, 3), S = image_size in pixels.

    What is not square is cropped to the square in its centre. Larger images are reduced with Lanczos, which
    antialiases; smaller ones are enlarged bicubically; those of the right size pass unchanged.
    """
    height, width = rgb.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = np.ascontiguousarray(rgb[top : top + side, left : left + side])
    if side == image_size:
        return square
    resample = Image.Resampling.LANCZOS if side > image_size else Image.Resampling.BICUBIC
    return np.array(Image.fromarray(square).resize((image_size, image_size), resample))


def decode_image(data: bytes, image_size: int) -> np.ndarray:
    """The bytes of an image file -> uint8 (S, S, 3): `decode_rgb`, then `fit_square`. Raises BadImage."""
    return fit_square(decode_rgb(data), image_size)


def read_image(path: Path, image_size: int, fit: bool) -> np.ndarray:
    """Read an image file as uint8 (S, S, 3), S = image_size in pixels; with `fit` it may have another size.

    Raises:
        UserError: there is no such file, it is no image, or not of that size, and `fit` is False.
    """
    try:
        rgb = decode_rgb(path.read_bytes())
    except BadImage as error:
        raise UserError(f"{path}: {error}") from error
    except OSError as error:
        what = "an image is named by its file, or by its number (0, 1, ...) among those of the seed"
        raise UserError(f"{path}: {error.strerror}; {what}") from error
    height, width = rgb.shape[:2]
    if not fit and (height, width) != (image_size, image_size):
        raise UserError(
            f"{path} is {width}x{height} pixels, the model's images are {image_size}x{image_size}; "
            "--fit crops and resizes it"
        )
    return fit_square(rgb, image_size)
