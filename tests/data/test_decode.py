"""data/decode.py: every colour mode and bad form, against values worked out by hand or by NumPy."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image

from data.decode import BadImage, fit_square, open_image, to_pixels
from tests.conftest import refused
from tests.data.packing import encoded, random_pixels

RGB = random_pixels(12, 16, 3)

# The three pixels are transparent, opaque, and opaque to a fifth.
RGBA = np.uint8([[[10, 20, 30, 0], [10, 20, 30, 255], [0, 100, 200, 51]]])
OVER_WHITE = [[[255, 255, 255], [10, 20, 30], [204, 224, 244]]]

# Values of 16 bits are scaled by 1 / 257; here are some on both sides of a half.
GREY_16 = np.uint16([[0, 128, 129, 300, 25_700, 25_828, 25_829, 65_535]])

PALETTE = Image.new("P", (2, 1))
PALETTE.putpalette([10, 20, 30, 200, 100, 50])
PALETTE.putdata([1, 0])

# A palette of 256 greys holds these.
GREYS = RGB[..., 0]
SECOND = {"save_all": True, "append_images": [Image.new("L", (8, 8))]}
TWO_FRAMES = encoded(GREYS, "GIF", **SECOND)

# For each form: a file's bytes, the right pixels, and how far off these may be.
FORMS = {
    "16-bit grey, scaled and not clipped": (
        encoded(GREY_16),
        np.round(GREY_16[..., None] / 65535 * 255),
        0,
    ),
    "transparent palette": (
        encoded(PALETTE, transparency=0),
        [[[200, 100, 50], [255, 255, 255]]],
        0,
    ),
    "alpha": (encoded(RGBA), OVER_WHITE, 0),
    "the first frame of a GIF": (TWO_FRAMES, GREYS[..., None], 0),
    # Some cameras put a small preview behind the photo, as a second image of the file.
    "a preview behind a photo": (
        encoded(np.full((32, 32, 3), 80, np.uint8), "MPO", **SECOND),
        np.full((32, 32, 1), 80),
        2,
    ),
}


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("data, expected, tolerance", FORMS.values(), ids=FORMS)
def test_every_form_becomes_rgb_or_grey(data, expected, tolerance, channels):
    decoded = to_pixels(open_image(data), channels)

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
    exif = Image.Exif()
    # The stored image is to be turned clockwise by a quarter, as those of phones are.
    exif[0x0112] = 6
    assert_array_equal(open_image(encoded(RGB, exif=exif)), np.rot90(RGB, -1))


def test_an_image_of_too_many_pixels_is_a_bad_one():
    # A GIF says how large it is, without a checksum.
    with refused("DecompressionBomb", BadImage):
        open_image(TWO_FRAMES[:6] + np.uint16([20_000, 20_000]).tobytes() + TWO_FRAMES[10:])


@pytest.mark.parametrize("size, kernel", [(5, Image.LANCZOS), (25, Image.BICUBIC)])
def test_the_middle_square_is_resized_by_pillow(size, kernel):
    expected = Image.fromarray(RGB[:, 2:14]).resize((size, size), kernel)
    assert_array_equal(fit_square(RGB, size), expected)
