"""Images and archives made to do harm: bombs, lies about sizes and names, and what terminals would obey."""

import os
import struct
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest

from data.datasets import hash_ids
from data.decode import BadImage, decode_rgb
from data.sources import find_source
from functions.support.errors import UserError
from functions.support.files import short
from tests.data.packing import IMAGES, encoded, load, png, write_folder, write_zip
from tests.spoilt_files import zipped

CENTRAL, LOCAL = b"PK\x01\x02", b"PK\x03\x04"


def patched(path, *changes):
    """Overwrite fields of a zip's first entry, in its list of members or in the member's own header or data."""
    data = bytearray(path.read_bytes())
    for signature, offset, code, value in changes:
        struct.pack_into(code, data, data.index(signature) + offset, value)
    path.write_bytes(data)
    return path


def test_a_png_with_wrong_checksums_is_refused():
    rows = b"\0" + bytes(range(24))
    whole = png(8, 1, 8, 2, rows)
    assert decode_rgb(whole).ravel().tolist() == list(range(24))
    # Other pixels, soundly packed, with the old checksum: Pillow alone shows them
    body, other = zlib.compress(rows), zlib.compress(b"\0" + bytes(reversed(range(24))))
    assert len(body) == len(other)
    with pytest.raises(BadImage, match="checksum"):
        decode_rgb(whole.replace(body, other))


def test_a_member_that_unpacks_to_more_than_it_says_takes_no_memory(tmp_path):
    path = tmp_path / "bomb.zip"
    path.write_bytes(zipped({"0.png": bytes(50 * 2**20)}))
    patched(path, (CENTRAL, 24, "<I", 1000), (LOCAL, 22, "<I", 1000))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"0\.png \(cannot be read \(Bad CRC"):
            load(path)
        assert tracemalloc.get_traced_memory()[1] < 5 * 2**20
    finally:
        tracemalloc.stop()


def test_members_that_are_too_large_or_damaged_are_left_out(tmp_path):
    path = patched(write_zip(tmp_path / "large.zip"), (CENTRAL, 24, "<I", 2**31))
    assert load(path, max_bad_images=1).bad_images == [["00009.png", "larger than 100 MiB"]]
    # a format without a checksum of its own
    path = write_zip(tmp_path / "flipped.zip", pattern="{number:05d}.bmp")
    pack = load(
        patched(path, (b"BM", 100, "B", 255 - encoded(IMAGES[9], "BMP")[100])), max_bad_images=1
    )
    assert pack.bad_images == [["00009.bmp", "cannot be read (Bad CRC-32 for file '00009.bmp')"]]
    np.testing.assert_array_equal(pack.images, IMAGES[:9])


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_methods_than_deflate_are_not_unpacked(tmp_path, method):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("0.png", encoded(IMAGES[0]), method)
        archive.writestr("1.png", encoded(IMAGES[1]))
    pack = load(path, max_bad_images=1)
    assert pack.bad_images == [["0.png", "cannot be read (packed by another method than deflate)"]]
    np.testing.assert_array_equal(pack.images, IMAGES[1:2])
    (tmp_path / "set.npz").write_bytes(zipped({"arr_0.npy": b""}, method))
    with pytest.raises(UserError, match="another method"):
        find_source(tmp_path / "set.npz", 8)


def test_names_do_not_reach_the_terminal_as_they_are(tmp_path, capsys):
    assert short("a\x1b[2J\nb\u202eé人") == "a\\x1b[2J\\nb\\u202eé人"
    assert len(short("x" * 10_000)) < 210
    path = write_zip(tmp_path / "set.zip", more={"\x1b[2J\n0.png": b"no image"})
    with pytest.raises(UserError, match="1 unusable") as error:
        load(path)
    assert "\x1b" not in str(error.value) and "\n" not in str(error.value)
    printed = capsys.readouterr().out
    assert "left out: \\x1b[2J\\n0.png" in printed and "\x1b" not in printed


def test_file_names_that_are_no_utf_8_are_read(tmp_path):
    more = {os.fsdecode(b"\xfe.png"): b"no image", os.fsdecode(b"\xfd.png"): encoded(IMAGES[2])}
    path = write_folder(tmp_path / os.fsdecode(b"set\xff"), IMAGES[:2], more=more)
    pack = load(path, max_bad_images=1)
    assert pack.ids == ["00000.png", "00001.png", "\udcfd.png"]
    assert load(path, max_bad_images=1).ids == pack.ids  # from the record beside it
    assert hash_ids(pack.ids) != hash_ids(pack.ids[:2])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("(1000000000000, 8, 8, 3)", "not as large as it says"),  # before anything is counted by it
        # As if it was cut short; or continued
        *((f"({n}, 8, 8, 3)", "not as large as it says") for n in (11, 9)),
        ("(1, 100000, 100000, 3)", "not as large as it says|damaged"),
        ("(-10, 8, 8, 3)", "exactly one"),
        *((shape, "cannot be read") for shape in ("(" * 500, "(10, 8, 8, 3")),
    ],
)
def test_an_array_that_lies_about_its_shape_is_an_error(tmp_path, shape, message):
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    header = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text
    path = write_zip(tmp_path / "set.npz", [], more={"arr_0.npy": header + IMAGES.tobytes()})
    with pytest.raises(UserError, match=message) as error:
        find_source(path, 8)
    assert str(path) in str(error.value)
