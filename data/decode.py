"""Image files of any colour mode -> uint8 RGB pixels, or the reason why they cannot be used."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from functions.support.errors import UserError
from functions.support.files import READ_ERRORS, short

# Pillow would also try dozens of formats that no image set uses, and for some of them it calls
# other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")

# This is Pillow's limit for one image; beyond it Pillow suspects a decompression bomb.
MAX_PIXELS = 89_478_485


class BadImage(UserError):
    """An image that cannot be used; the message is the reason, without the file's name."""


def decode_rgb(data: bytes) -> np.ndarray:
    """Decode the bytes of a PNG, JPEG, WebP or BMP -> uint8 (H, W, 3) at the file's own size.

    The image is turned upright by its EXIF orientation. Alpha and transparent colours are
    composited over white; grey, palette and CMYK become RGB. 16-bit grey is scaled to 8 bits; of
    16-bit colour Pillow keeps the high byte, which is at most one level off. Embedded colour
    profiles are ignored.

    Raises BadImage for anything animated, truncated, corrupt, of more than MAX_PIXELS or not an
    image. A damaged JPEG can decode without complaint; inside a zip its checksum tells.
    """
    return convert_to_rgb(open_image(data))


def open_image(data: bytes) -> Image.Image:
    """Return a Pillow image of any mode, loaded and upright; raises as `decode_rgb` does."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            if image.format == "PNG":
                # load() ignores the checksums of the pixels, so verify() compares them first.
                image.verify()

        # verify() leaves an image that cannot be loaded, so the bytes are opened again.
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            # An MPO is a photo with previews behind it, not an animation.
            if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
                raise BadImage(f"animated ({image.n_frames} frames)")
            image.load()
            return ImageOps.exif_transpose(image)
    except Image.DecompressionBombError:
        raise BadImage("too many pixels (a decompression bomb?)") from None
    except UnidentifiedImageError:
        reason = f"not a {', '.join(FORMATS)} image" if data else "empty file"
        raise BadImage(reason) from None
    except READ_ERRORS as error:
        raise BadImage(f"broken file ({type(error).__name__}: {short(error)})") from None


def convert_to_rgb(image: Image.Image) -> np.ndarray:
    """Convert a Pillow image of any mode -> uint8 (H, W, 3)."""
    if image.mode.startswith("I"):
        # convert("RGB") would clip 16-bit grey. It is scaled instead, by 65535 / 255 = 257, and
        # rounded to the nearest level.
        grey = np.asarray(image).astype(np.int32)
        levels = (grey + 128) // 257
        if "transparency" in image.info:
            levels[grey == image.info["transparency"]] = 255
        levels = levels.clip(0, 255).astype(np.uint8)
        return np.repeat(levels[..., None], 3, axis=2)

    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def fit_square(rgb: np.ndarray, image_size: int) -> np.ndarray:
    """Crop and resize uint8 (H, W, 3) -> uint8 (S, S, 3), S = image_size in pixels.

    Grey levels (H, W) become (S, S). What is not square is cropped to the square in its centre. An
    image of the right size passes unchanged.
    """
    height, width = rgb.shape[:2]
    side = min(height, width)
    top = (height - side) // 2
    left = (width - side) // 2
    square = np.ascontiguousarray(rgb[top : top + side, left : left + side])
    if side == image_size:
        return square

    # Lanczos antialiases an image that gets smaller; one that gets larger needs no antialiasing.
    resample = Image.LANCZOS if side > image_size else Image.BICUBIC
    resized = Image.fromarray(square).resize((image_size, image_size), resample)
    return np.array(resized)


def read_file(path: str, hint: str = "") -> Image.Image:
    """Read one image file, as `open_image` does.

    Raises UserError when it is no image, or when there is no such file; then `hint` follows.
    """
    try:
        return open_image(Path(path).read_bytes())
    except BadImage as error:
        raise UserError(f"{path}: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}{hint}") from error


def read_with_mask(
    path: str, mask_path: str | None, image_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Read an image of which a part is to be made anew -> uint8 (S, S, 3), and bool (S, S).

    The bool array says which part. It is what is white in the mask's file; without one, what is
    transparent in the image. Both are cropped and resized as training images are, to S =
    image_size. Raises UserError as `read_file` does, and for a mask that has another size or is
    empty or full.
    """
    image = read_file(path)
    if mask_path:
        mask_image = read_file(mask_path)
    elif image.mode.startswith("I"):
        # Pillow does not convert 16-bit grey to RGBA; such an image has no transparent part.
        mask_image = Image.new("L", image.size)
    else:
        alpha = image.convert("RGBA").getchannel("A")
        mask_image = ImageOps.invert(alpha)

    if mask_image.size != image.size:
        raise UserError(
            f"{mask_path} has {mask_image.width}x{mask_image.height} pixels, its image "
            f"{image.width}x{image.height}; a mask must be as large as its image"
        )

    white = convert_to_rgb(mask_image).mean(axis=2) >= 128
    mask = fit_mask(white, image_size)
    if mask.all() or not mask.any():
        part = "everything" if mask.all() else "nothing"
        raise UserError(
            f"{mask_path or path}: {part} would be made anew; name a --mask that is white in part, "
            "or erase a part of the image"
        )
    return fit_square(convert_to_rgb(image), image_size), mask


def fit_mask(mask: np.ndarray, image_size: int) -> np.ndarray:
    """Crop and resize a mask, bool (H, W), as `fit_square` does its image -> bool (S, S).

    The mask is true where the image is made anew.
    """
    levels = fit_square(np.uint8(255) * mask, image_size)

    # A pixel with a tenth of its area in the mask is made anew as a whole, because it has taken up
    # some of what was there.
    return levels > 25


def read_image(path: str, image_size: int, fit: bool) -> np.ndarray:
    """Read one image file for a model -> uint8 (S, S, 3), S = image_size in pixels.

    Raises UserError as `read_file`, or when it has another size and `fit` is False.
    """
    hint = "; an image is named by its file, or by its number (0, 1, ...) among those of the seed"
    rgb = convert_to_rgb(read_file(path, hint))
    if not fit and rgb.shape[:2] != (image_size, image_size):
        raise UserError(
            f"{path} is {rgb.shape[1]}x{rgb.shape[0]} pixels, the model's images are "
            f"{image_size}x{image_size}; --fit crops and resizes it"
        )
    return fit_square(rgb, image_size)
