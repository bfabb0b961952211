"""data/decode.py: every colour mode and bad form, against values worked out by hand or by NumPy."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data.decode import BadImage, decode_rgb, fit_square, read_image
from functions.support.errors import UserError

RGB = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)


def encode(image, image_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def png(width, height, bit_depth, colour_type, rows, extra=b""):
    """A PNG put together by hand from its filtered rows, independent of any encoder."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def test_lossless_rgb_is_unchanged():
    for data in (
        encode(Image.fromarray(RGB)),
        encode(Image.fromarray(RGB), "BMP"),
        encode(Image.fromarray(RGB), "WEBP", lossless=True),
    ):
        np.testing.assert_array_equal(decode_rgb(data), RGB)


def test_grey_is_repeated_over_the_channels():
    grey = RGB[..., 0]
    np.testing.assert_array_equal(decode_rgb(encode(Image.fromarray(grey))), np.stack([grey] * 3, -1))
    one_bit = Image.fromarray(grey).convert("1")
    assert set(np.unique(decode_rgb(encode(one_bit)))) == {0, 255}


def test_16_bit_grey_is_scaled_not_clipped():
    values = np.array([0, 128, 129, 300, 257 * 100, 257 * 100 + 128, 257 * 100 + 129, 65535], dtype=np.uint16)
    decoded = decode_rgb(png(8, 1, 16, 0, b"\0" + values.astype(">u2").tobytes()))
    np.testing.assert_array_equal(decoded[0, :, 1], np.round(values / 65535 * 255))


def test_16_bit_rgb_is_within_one_level():
    values = np.random.default_rng(1).integers(0, 65536, (1, 9, 3), dtype=np.uint16)
    decoded = decode_rgb(png(9, 1, 16, 2, b"\0" + values.astype(">u2").tobytes()))
    assert np.abs(decoded - values / 65535 * 255).max() <= 1


def test_palette():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([1, 0])
    assert decode_rgb(encode(image)).tolist() == [[[200, 100, 50], [10, 20, 30]]]


def test_alpha_is_composited_over_white():
    rgba = np.array([[[10, 20, 30, 0], [10, 20, 30, 255], [0, 100, 200, 51]]], dtype=np.uint8)
    expected = rgba[..., :3] * (rgba[..., 3:] / 255) + 255 * (1 - rgba[..., 3:] / 255)
    for image_format, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        decoded = decode_rgb(encode(Image.fromarray(rgba), image_format, **options))
        np.testing.assert_allclose(decoded, expected, atol=1)
    grey_alpha = Image.fromarray(np.array([[[0, 0], [100, 255]]], dtype=np.uint8), "LA")
    assert decode_rgb(encode(grey_alpha))[0, :, 0].tolist() == [255, 100]


def test_transparent_colours_become_white():
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putdata([1, 0])
    assert decode_rgb(encode(palette, transparency=0)).tolist() == [[[200, 100, 50], [255, 255, 255]]]
    transparent_grey = (
        struct.pack(">I", 2)
        + b"tRNS"
        + struct.pack(">H", 257)
        + struct.pack(">I", zlib.crc32(b"tRNS" + struct.pack(">H", 257)))
    )
    rows = b"\0" + np.array([257, 514], ">u2").tobytes()
    assert decode_rgb(png(2, 1, 16, 0, rows, transparent_grey))[0, :, 0].tolist() == [255, 2]


def test_cmyk_becomes_rgb():
    cmyk = Image.new("CMYK", (16, 16), (255, 0, 0, 0))  # pure cyan ink
    assert np.abs(decode_rgb(encode(cmyk, "JPEG", quality=100)).astype(int) - [0, 255, 255]).max() <= 3


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: np.rot90(a, 2).transpose(1, 0, 2)),
        (8, lambda a: np.rot90(a, 1)),
    ],
)
def test_exif_orientation_is_applied(orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decode_rgb(encode(Image.fromarray(RGB), exif=exif)), turn(RGB))


def test_multi_picture_jpeg_is_a_photo_not_an_animation():
    image = Image.fromarray(np.full((32, 32, 3), 80, np.uint8))
    data = encode(image, "MPO", save_all=True, append_images=[Image.new("RGB", (32, 32))])
    assert np.abs(decode_rgb(data).astype(int) - 80).max() <= 2


def animated(image_format):
    frames = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    return encode(frames[0], image_format, save_all=True, append_images=frames[1:])


def flipped_bit(data):
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (animated("PNG"), "animated"),
        (animated("WEBP"), "animated"),
        (animated("GIF"), "not a"),
        (encode(Image.fromarray(RGB))[:200], "broken"),
        (encode(Image.fromarray(RGB), "JPEG")[:500], "broken"),
        (encode(Image.fromarray(RGB), "WEBP", lossless=True)[:200], "not a|broken"),
        (encode(Image.fromarray(RGB), "BMP")[:200], "broken"),
        (flipped_bit(encode(Image.fromarray(RGB))), "broken"),
        (b"", "empty"),
        (b"<html>Quota exceeded</html>", "not a"),
        (encode(Image.fromarray(RGB), "TIFF"), "not a"),
        (png(20_000, 20_000, 8, 2, b""), "too many pixels"),  # over twice Pillow's limit: its error
        (png(10_000, 10_000, 8, 2, b""), "too many pixels"),  # over the limit: its warning
    ],
)
def test_bad_images_are_refused_with_the_reason(data, reason):
    with pytest.raises(BadImage, match=reason):
        decode_rgb(data)


def test_damaged_bytes_raise_nothing_but_bad_image():
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    image = Image.fromarray(RGB)
    files = [
        encode(image, exif=exif),
        encode(image, "JPEG", exif=exif),
        encode(image, "WEBP", exif=exif),
        encode(image, "BMP"),
        animated("PNG"),
    ]
    for round_number in range(3000):
        data = bytearray(files[round_number % len(files)])
        data[rng.integers(min(len(data), 300))] = rng.integers(256)
        with contextlib.suppress(BadImage):
            assert decode_rgb(bytes(data)).dtype == np.uint8


def test_centre_crop_and_pass_through():
    wide = np.arange(4 * 8 * 3, dtype=np.uint8).reshape(4, 8, 3)
    np.testing.assert_array_equal(fit_square(wide, 4), wide[:, 2:6])
    np.testing.assert_array_equal(fit_square(wide.transpose(1, 0, 2), 4), wide.transpose(1, 0, 2)[2:6])


def test_reducing_antialiases():
    # A checkerboard of single pixels has no detail that half the size could show: without antialiasing it stays black
    # and white (or turns into one of them), with it it becomes the mean.
    board = np.indices((64, 64)).sum(0) % 2 * 255
    reduced = fit_square(np.stack([board] * 3, -1).astype(np.uint8), 32)
    assert np.abs(reduced[4:-4, 4:-4].astype(int) - 127.5).max() <= 4


def test_reducing_and_enlarging_keep_smooth_images():
    ramp = np.broadcast_to(np.linspace(20, 220, 64)[None, :, None], (64, 64, 3))
    for size in (32, 128):
        expected = np.interp((np.arange(size) + 0.5) * 64 / size - 0.5, np.arange(64), ramp[0, :, 0])
        resized = fit_square(np.round(ramp).astype(np.uint8), size)
        assert resized.shape == (size, size, 3)
        assert np.abs(resized[size // 2, 8:-8, 0] - expected[8:-8]).max() <= 1.5


def test_one_image_for_a_model(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "wide.png")
    Image.fromarray(RGB[:8, :8]).save(tmp_path / "right.png")
    (tmp_path / "none.png").write_bytes(b"no image")
    np.testing.assert_array_equal(read_image(str(tmp_path / "right.png"), 8, fit=False), RGB[:8, :8])
    np.testing.assert_array_equal(read_image(str(tmp_path / "wide.png"), 12, fit=True), RGB[:, 2:14])
    for name, message in (
        ("wide.png", "wide.png is 16x12 pixels, the model's images are 12x12; --fit crops and resizes it"),
        ("none.png", "none.png: not a PNG"),
        ("missing.png", "missing.png: No such file or directory; an image is named by its file, or by its number"),
    ):
        with pytest.raises(UserError, match=message):
            read_image(str(tmp_path / name), 12, fit=False)
