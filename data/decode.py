"""Image files -> uint8 RGB pixels, whatever their colour mode; or the reason why they cannot be used."""

import io
import struct
import tarfile
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from functions.support.errors import UserError
from functions.support.files import short

# Pillow would also try dozens of formats that no image set uses, some of them by calling other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
# Of one image: Pillow's limit, beyond which it suspects a decompression bomb
MAX_PIXELS = 89_478_485

# What Python's, NumPy's and Pillow's readers raise on broken bytes
BROKEN_BYTES = (
    *(
        OSError,
        EOFError,
        ValueError,
        TypeError,
        LookupError,
        RuntimeError,
        SyntaxError,
        OverflowError,
    ),
    *(struct.error, zlib.error, zipfile.BadZipFile, tarfile.TarError, tokenize.TokenError),
)


class BadImage(UserError):
    """An image that cannot be used; the message is the reason, without the file's name."""


def decode_rgb(data: bytes) -> np.ndarray:
    """Decode the bytes of a PNG, JPEG, WebP or BMP -> uint8 (H, W, 3) at the file's own size.

    Turned upright by its EXIF orientation; alpha and transparent colours are composited over white; grey, palette and
    CMYK become RGB; 16-bit grey is scaled to 8 bits (of 16-bit colour Pillow keeps the high byte: at most one level
    off). Embedded colour profiles are ignored. Raises BadImage for anything animated, truncated, corrupt, of more than
    MAX_PIXELS or not an image. A damaged JPEG can decode without complaint; inside a zip its checksum tells.
    """
    return convert_to_rgb(open_image(data))


def open_image(data: bytes) -> Image.Image:
    """A Pillow image of any mode, loaded and upright; raises as `decode_rgb`."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            if image.format == "PNG":
                # The checksums of its chunks: load() passes over those of the pixels
                image.verify()
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            # An MPO is a photo with previews behind it, not an animation.
            if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
                raise BadImage(f"animated ({image.n_frames} frames)")
            image.load()
            return ImageOps.exif_transpose(image)
    except Image.DecompressionBombError:
        raise BadImage("too many pixels (a decompression bomb?)") from None
    except UnidentifiedImageError:
        raise BadImage("empty file" if not data else f"not a {', '.join(FORMATS)} image") from None
    except BROKEN_BYTES as error:
        raise BadImage(f"broken file ({type(error).__name__}: {short(error)})") from None


def convert_to_rgb(image: Image.Image) -> np.ndarray:
    """Convert a Pillow image of any mode -> uint8 (H, W, 3)."""
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int32)
        # 65535 / 255 = 257, rounded to nearest: scaled, where convert("RGB") would clip
        levels = (grey + 128) // 257
        if "transparency" in image.info:
            levels[grey == image.info["transparency"]] = 255
        return np.repeat(levels.clip(0, 255).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def fit_square(rgb: np.ndarray, image_size: int) -> np.ndarray:
    """Crop and resize uint8 (H, W, 3) -> uint8 (S, S, 3), S = image_size in pixels.

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


def read_file(path: str, hint: str = "") -> Image.Image:
    """One image file, as `open_image`. Raises UserError when there is no such file, or when it is no image."""
    try:
        return open_image(Path(path).read_bytes())
    except BadImage as error:
        raise UserError(f"{path}: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}{hint}") from error


def read_with_mask(
    path: str, mask_path: str | None, image_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """An image of which a part is to be made anew -> uint8 (S, S, 3), and bool (S, S): which part, S = image_size.

    That is what is white in the mask's file; without one, what is transparent in the image. Both are cropped and
    resized as training images are. UserError as `read_file`, and for a mask of another size, or an empty or full one.
    """
    image = read_file(path)
    opaque = image.mode.startswith("I")  # 16 bits, which Pillow does not convert
    alpha = Image.new("L", image.size, 255) if opaque else image.convert("RGBA").getchannel("A")
    mask = read_file(mask_path) if mask_path else ImageOps.invert(alpha)
    if mask.size != image.size:
        sizes = f"{mask.width}x{mask.height} pixels, its image {image.width}x{image.height}"
        raise UserError(f"{mask_path} has {sizes}; a mask must be as large as its image")
    anew = fit_mask(convert_to_rgb(mask).mean(axis=2) >= 128, image_size)
    if anew.all() or not anew.any():
        what = "everything" if anew.all() else "nothing"
        hint = "" if mask_path else "; name a --mask, or erase a part of the image"
        raise UserError(f"{mask_path or path}: {what} would be made anew{hint}")
    return fit_square(convert_to_rgb(image), image_size), anew


def fit_mask(anew: np.ndarray, image_size: int) -> np.ndarray:
    """Crop and resize a bool (H, W) of what is made anew, as `fit_square` does its image -> bool (S, S).

    A pixel that is so in a tenth is made anew as a whole: it has taken up some of what was there.
    """
    return fit_square(np.uint8(255) * anew[..., None].repeat(3, axis=2), image_size)[..., 0] > 25


def read_image(path: str, image_size: int, fit: bool) -> np.ndarray:
    """Read one image file for a model -> uint8 (S, S, 3), S = image_size in pixels.

    Raises UserError as `read_file`, or when it has another size and `fit` is False.
    """
    hint = "; an image is named by its file, or by its number (0, 1, ...) among those of the seed"
    rgb = convert_to_rgb(read_file(path, hint))
    if not fit and rgb.shape[:2] != (image_size, image_size):
        sizes = f"{rgb.shape[1]}x{rgb.shape[0]} pixels, the model's images are {image_size}x{image_size}"
        raise UserError(f"{path} is {sizes}; --fit crops and resizes it")
    return fit_square(rgb, image_size)
