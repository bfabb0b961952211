"""Decode image files of any colour mode to uint8 RGB, or report why they cannot be used."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from functions.support.errors import UserError
from functions.support.files import READ_ERRORS, short

# By default Pillow tries dozens of other formats too. No data set uses these, and Pillow runs other
# programs to read some of them.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")

# In an image with more pixels than this, Pillow suspects a decompression bomb.
MAX_PIXELS = 89_478_485


class BadImage(UserError):
    """An image cannot be used. The message gives the reason and does not name the file."""


def decode_rgb(data: bytes) -> np.ndarray:
    """Decode the bytes of a PNG, JPEG, WebP or BMP -> uint8 (H, W, 3) at its original size.

    The image is turned upright by its EXIF orientation. Alpha and transparent colours are
    composited over white. Grey, palette and CMYK become RGB. 16-bit grey is scaled to 8 bits.
    Pillow keeps the high byte of 16-bit colour, which is at most one level off. Embedded colour
    profiles are ignored.

    Raises BadImage for bytes that are not an image, and for an image that is truncated, corrupt,
    animated or larger than MAX_PIXELS. A damaged JPEG may decode without an error; in a zip, the
    checksum reveals the damage.
    """
    return convert_to_rgb(open_image(data))


def open_image(data: bytes) -> Image.Image:
    """Load a Pillow image of any mode and turn it upright. Raises as `decode_rgb` does."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            if image.format == "PNG":
                # load() ignores the checksums of the pixels, so verify() checks them first.
                image.verify()

        # An image cannot be loaded after verify(), so the bytes are opened again.
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            # The later frames of an MPO are previews of the photo, not an animation.
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
        # convert("RGB") would clip 16-bit grey. Here its values, at most 65535, are divided by
        # 65535 / 255 = 257 and rounded to the nearest level.
        grey = np.asarray(image, np.int32)
        levels = (grey + 128) // 257
        if "transparency" in image.info:
            levels[grey == image.info["transparency"]] = 255
        return np.repeat(np.uint8(levels)[..., None], 3, axis=2)

    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def fit_square(rgb: np.ndarray, image_size: int) -> np.ndarray:
    """Crop and resize uint8 (H, W, 3) -> uint8 (S, S, 3), S = image_size in pixels.

    Grey levels (H, W) become (S, S). The longer side is cropped at both ends. An S x S square is
    returned unchanged.
    """
    height, width = rgb.shape[:2]
    side = min(height, width)
    top = (height - side) // 2
    left = (width - side) // 2
    square = np.ascontiguousarray(rgb[top : top + side, left : left + side])
    if side == image_size:
        return square

    # An image that shrinks needs antialiasing, which Lanczos does.
    resample = Image.LANCZOS if side > image_size else Image.BICUBIC
    resized = Image.fromarray(square).resize((image_size, image_size), resample)
    return np.array(resized)


def open_image_file(path: str, hint: str = "") -> Image.Image:
    """Read one image file, as `open_image` does.

    Raises UserError when the file is not an image, or when it cannot be read. In the second case
    the message ends with `hint`.
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
    """Read an image to be inpainted and its mask -> uint8 (S, S, 3), and bool (S, S).

    The mask is true where the image is to be inpainted: where the mask's file is white or, if there
    is no such file, where the image is transparent. Both are cropped and resized as training images
    are, to S = image_size. Raises UserError as `open_image_file` does, and for a mask of another
    size than its image, or a mask that is true or false everywhere.
    """
    image = open_image_file(path)
    if mask_path:
        mask_image = open_image_file(mask_path)
    elif image.mode.startswith("I"):
        # Pillow does not convert 16-bit grey to RGBA. Such an image has no transparent part.
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
            f"{mask_path or path}: {part} would be inpainted; give a --mask that is partly white, "
            "or erase a part of the image"
        )
    return fit_square(convert_to_rgb(image), image_size), mask


def fit_mask(mask: np.ndarray, image_size: int) -> np.ndarray:
    """Crop and resize a mask, bool (H, W), as `fit_square` does with its image -> bool (S, S)."""
    levels = fit_square(np.uint8(255) * mask, image_size)

    # The mask may cover a resized pixel only in part. The pixel is inpainted if the mask covers
    # more than a tenth of it.
    return levels > 25


def read_image(path: str, image_size: int, fit: bool) -> np.ndarray:
    """Read one image file for a model -> uint8 (S, S, 3), S = image_size in pixels.

    Raises UserError as `open_image_file` does, or when the image has another size and `fit` is
    False.
    """
    hint = "; give an image file, or the index (0, 1, ...) of an image that the seed generates"
    rgb = convert_to_rgb(open_image_file(path, hint))
    if not fit and rgb.shape[:2] != (image_size, image_size):
        raise UserError(
            f"{path} is {rgb.shape[1]}x{rgb.shape[0]} pixels, the model's images are "
            f"{image_size}x{image_size}; --fit crops and resizes it"
        )
    return fit_square(rgb, image_size)
