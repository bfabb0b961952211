"""data/decode.py: every colour mode and bad form, against values worked out by hand or by NumPy."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image, PngImagePlugin

from data.decode import BadImage, decode, fit_square, read_image
from functions.support.errors import UserError
from tests.data.packing import encoded, png, random_pixels

RGB = random_pixels(12, 16, 3)
ONE_BIT = Image.fromarray(RGB[..., 0]).convert("1")

# The three pixels are transparent, opaque, and opaque to a fifth.
RGBA = np.uint8([[[10, 20, 30, 0], [10, 20, 30, 255], [0, 100, 200, 51]]])
ALPHA = RGBA[..., 3:] / 255
OVER_WHITE = RGBA[..., :3] * ALPHA + 255 * (1 - ALPHA)
GREY_WITH_ALPHA = np.uint8([[[0, 0], [100, 255]]])

# Values of 16 bits are scaled by 1 / 257; here are some on both sides of a half.
GREY_16 = np.uint16([[0, 128, 129, 300, 257 * 100, 257 * 100 + 128, 257 * 100 + 129, 65535]])

PALETTE = Image.new("P", (2, 1))
PALETTE.putpalette([10, 20, 30, 200, 100, 50])
PALETTE.putdata([1, 0])

CYAN_INK = Image.new("CMYK", (16, 16), (255, 0, 0, 0))

# Some editors write megabytes of text, which are small when compressed.
LARGE_TEXT = PngImagePlugin.PngInfo()
LARGE_TEXT.add_text("history", "x" * 2**21, zip=True)

# A palette of 256 greys holds these.
GREYS = RGB[..., :1]


def animated(image_format, **options):
    """Return the bytes of a file with two frames."""
    frames = [Image.fromarray(255 - GREYS[..., 0])]
    options = {"save_all": True, "append_images": frames, **options}
    return encoded(GREYS[..., 0], image_format, **options)


# Some cameras put a small preview behind the photo, as a second image of the file.
PREVIEWED = encoded(
    np.full((32, 32, 3), 80, np.uint8),
    "MPO",
    save_all=True,
    append_images=[Image.new("RGB", (8, 8))],
)


# For each form: a file's bytes, the right pixels, and how far off these may be.
FORMS = {
    "png": (encoded(RGB), RGB, 0),
    "grey": (encoded(RGB[..., 0]), RGB[..., :1], 0),
    "one bit": (encoded(ONE_BIT), np.asarray(ONE_BIT)[..., None] * 255, 0),
    "16-bit grey, scaled and not clipped": (
        encoded(GREY_16),
        np.round(GREY_16[..., None] / 65535 * 255),
        0,
    ),
    "palette": (encoded(PALETTE), [[[200, 100, 50], [10, 20, 30]]], 0),
    "transparent palette": (
        encoded(PALETTE, transparency=0),
        [[[200, 100, 50], [255, 255, 255]]],
        0,
    ),
    "alpha": (encoded(RGBA), OVER_WHITE, 1),
    "the first frame of a GIF": (animated("GIF"), GREYS, 0),
    "the first frame of an animated PNG": (animated("PNG"), GREYS, 0),
    "large text": (encoded(RGB, pnginfo=LARGE_TEXT), RGB, 0),
    "large profile": (encoded(RGB, icc_profile=bytes(2**21)), RGB, 0),
    "grey with alpha": (encoded(GREY_WITH_ALPHA), [[[255], [100]]], 0),
    "cmyk": (encoded(CYAN_INK, "JPEG", quality=100), np.full((16, 16, 3), [0, 255, 255]), 3),
    "a photo with a preview behind it": (PREVIEWED, np.full((32, 32, 1), 80), 2),
}


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize(("data", "expected", "tolerance"), FORMS.values(), ids=FORMS)
def test_every_form_becomes_rgb_or_grey(data, expected, tolerance, channels):
    decoded = decode(data, channels)

    assert decoded.dtype == np.uint8
    assert decoded.shape == (*np.shape(expected)[:2], channels)
    # Grey stands for three equal channels.
    expected = np.broadcast_to(expected, (*decoded.shape[:2], 3))
    if channels == 1:
        # This is the luma of ITU-R BT.601, which is rounded to a level.
        expected = expected @ [[0.299], [0.587], [0.114]]
        tolerance += 0.501
    np.testing.assert_allclose(decoded, expected, rtol=0, atol=tolerance)


def test_exif_orientation_is_applied():
    # Orientations 1 to 8 say how the stored image is to be shown.
    across = RGB.transpose(1, 0, 2)
    turned = [
        RGB,
        RGB[:, ::-1],
        RGB[::-1, ::-1],
        RGB[::-1],
        across,
        across[:, ::-1],
        across[::-1, ::-1],
        across[::-1],
    ]
    for orientation, expected in enumerate(turned, start=1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        decoded = decode(encoded(RGB, exif=exif))
        assert_array_equal(decoded, expected)


# The last 12 bytes are a chunk of their own. Before it stands the checksum of the pixels.
PNG = encoded(RGB)
WRONG_CHECKSUM = PNG[:-13] + bytes([PNG[-13] ^ 1]) + PNG[-12:]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encoded(RGB)[:200], "cannot be decoded"),
        (encoded(RGB, "JPEG")[:500], "cannot be decoded"),
        (WRONG_CHECKSUM, "checksum"),
        (b"<html>Quota exceeded</html>", "not a"),
        (encoded(RGB, "TIFF"), "not a"),
        (b"", "empty"),
        # Pillow raises an error for over twice its limit of pixels.
        (png(20_000, 20_000, 8, 2, b""), "DecompressionBomb"),
    ],
)
def test_bad_images_are_refused_with_the_reason(data, reason):
    with pytest.raises(BadImage, match=reason):
        decode(data)


def test_an_image_of_another_shape_is_read_only_to_be_fitted(tmp_path):
    path = tmp_path / "wide.png"
    path.write_bytes(encoded(RGB))

    assert_array_equal(read_image(str(path), (3, 12, 12), fit=True), RGB[:, 2:14])

    message = "is 16x12 pixels, the model's images are 12x12; --fit crops and resizes it"
    with pytest.raises(UserError, match=message):
        read_image(str(path), (3, 12, 12), fit=False)


def lanczos(x):
    """Return the sinc, windowed by a sinc of three times its width."""
    return np.where(abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)


def test_resizing_is_by_the_kernels_formula_and_antialiases():
    size = 25
    pixels = np.random.default_rng(0).integers(64, 192, (64, 64, 3), dtype=np.uint8)

    # These are the centres of the new pixels, in coordinates of the old ones.
    ratio = 64 / size
    centres = (np.arange(size) + 0.5) * ratio - 0.5

    # The kernel gets as much wider as the image gets smaller.
    distances = np.arange(64) - centres[:, None]
    weights = lanczos(distances / max(ratio, 1))
    weights /= weights.sum(1, keepdims=True)
    expected = np.einsum("yi,xj,ijc->yxc", weights, weights, pixels, optimize=True)

    # Pillow rounds once for each axis.
    error = np.abs(fit_square(pixels, size) - expected)
    assert error.max() <= 1.5
