"""Images and archives made to do harm.

They are bombs, lie about sizes and names, or hold what terminals would obey.
"""

import os
import struct
import tracemalloc
import zipfile
import zlib

import pytest
from numpy.testing import assert_array_equal

from data.datasets import hash_ids
from data.decode import BadImage, decode
from data.sources import find_source
from functions.support.errors import UserError
from functions.support.files import short
from tests.data.packing import IMAGES, encoded, load, png, write_folder, write_zip

# A zip has these signatures before a member's entry in the list at its end, and before its data.
CENTRAL = b"PK\x01\x02"
LOCAL = b"PK\x03\x04"


def patch(path, signature, offset, code, value):
    """Overwrite a field of a file, `offset` bytes after the first place with the signature."""
    data = bytearray(path.read_bytes())
    struct.pack_into(code, data, data.index(signature) + offset, value)
    path.write_bytes(data)


def test_a_png_with_wrong_checksums_is_refused():
    rows = b"\0" + bytes(range(24))
    sound = png(8, 1, 8, 2, rows)
    assert decode(sound).ravel().tolist() == list(range(24))

    # Other pixels are packed soundly, but the checksum is the old one. Pillow alone shows them.
    body = zlib.compress(rows)
    other_body = zlib.compress(b"\0" + bytes(reversed(range(24))))
    assert len(body) == len(other_body)
    with pytest.raises(BadImage, match="checksum"):
        decode(sound.replace(body, other_body))


def test_a_member_that_unpacks_to_more_than_it_says_takes_no_memory(tmp_path):
    # The member unpacks to 50 MiB. Both of its entries say 1,000 bytes.
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.png", bytes(50 * 2**20))
    patch(path, CENTRAL, 24, "<I", 1000)
    patch(path, LOCAL, 22, "<I", 1000)

    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"0\.png \(cannot be read \(Bad CRC"):
            load(path)
        peak = tracemalloc.get_traced_memory()[1]
        assert peak < 5 * 2**20
    finally:
        tracemalloc.stop()


def test_a_member_that_is_too_large_is_left_out(tmp_path):
    path = write_zip(tmp_path / "large.zip")
    patch(path, CENTRAL, 24, "<I", 2**31)
    pack = load(path, max_bad_images=1)
    assert pack.bad_images == [["00009.png", "larger than 100 MiB"]]


def test_a_member_that_is_damaged_is_left_out(tmp_path):
    # BMP has no checksum of its own, so only the zip's tells that a byte is wrong.
    path = write_zip(tmp_path / "flipped.zip", pattern="{number:05d}.bmp")
    byte = encoded(IMAGES[9], "BMP")[100]
    patch(path, b"BM", 100, "B", 255 - byte)

    pack = load(path, max_bad_images=1)
    assert pack.bad_images == [["00009.bmp", "cannot be read (Bad CRC-32 for file '00009.bmp')"]]
    assert_array_equal(pack.images, IMAGES[:9])


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_methods_than_deflate_are_not_unpacked(tmp_path, method):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("0.png", encoded(IMAGES[0]), method)
        archive.writestr("1.png", encoded(IMAGES[1]))
    pack = load(path, max_bad_images=1)
    assert pack.bad_images == [
        ["0.png", "cannot be read (compressed by a method other than deflate)"]
    ]
    assert_array_equal(pack.images, IMAGES[1:2])


def test_names_do_not_reach_the_terminal_as_they_are(tmp_path, capsys):
    assert short("a\x1b[2J\nb\u202eé人") == "a\\x1b[2J\\nb\\u202eé人"
    assert len(short("x" * 10_000)) < 210

    # This name would clear the screen.
    path = write_zip(tmp_path / "set.zip", more={"\x1b[2J\n0.png": b"no image"})
    with pytest.raises(UserError, match="1 unusable") as error:
        load(path)
    assert "\x1b" not in str(error.value)
    assert "\n" not in str(error.value)

    printed = capsys.readouterr().out
    assert "left out: \\x1b[2J\\n0.png" in printed
    assert "\x1b" not in printed


def test_file_names_that_are_no_utf_8_are_read(tmp_path):
    folder = tmp_path / os.fsdecode(b"set\xff")
    more = {os.fsdecode(b"\xfe.png"): b"no image", os.fsdecode(b"\xfd.png"): encoded(IMAGES[2])}
    write_folder(folder, IMAGES[:2], more=more)

    pack = load(folder, max_bad_images=1)
    assert pack.ids == ["00000.png", "00001.png", "\udcfd.png"]
    assert hash_ids(pack.ids) != hash_ids(pack.ids[:2])

    # The second time, the names come from the record beside the pack.
    assert load(folder, max_bad_images=1).ids == pack.ids


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        # This is refused before anything is counted by it.
        ("(1000000000000, 8, 8, 3)", "differs from its header"),
        # More data follows the array.
        ("(9, 8, 8, 3)", "differs from its header"),
        ("(-10, 8, 8, 3)", "exactly one"),
        # This is no Python expression.
        ("(" * 500, "cannot be read"),
    ],
)
def test_an_array_that_lies_about_its_shape_is_an_error(tmp_path, shape, message):
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    header = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text
    path = write_zip(tmp_path / "set.npz", [], more={"arr_0.npy": header + IMAGES.tobytes()})

    with pytest.raises(UserError, match=message) as error:
        find_source(path, 8)
    assert str(path) in str(error.value)
