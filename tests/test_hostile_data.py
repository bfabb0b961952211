"""Images and archives made to do harm: bombs, lies about sizes and names, and what terminals would obey."""

import io
import os
import struct
import tracemalloc
import warnings
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from data import reading
from data.archives import printable
from data.datasets import hash_ids
from data.decode import BadImage, decode_rgb
from data.sources import find_source
from functions.support.errors import UserError
from tests.packing import IMAGES, load, write_folder, write_zip
from tests.test_data_decode import png

CENTRAL, LOCAL = b"PK\x01\x02", b"PK\x03\x04"


def encoded(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def patched(path, *changes):
    """Overwrite fields of a zip's first entry, in its list of members or in the member's own header."""
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
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.png", bytes(200 * 2**20))
    patched(path, (CENTRAL, 24, "<I", 1000), (LOCAL, 22, "<I", 1000))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"0\.png \(cannot be unpacked \(Bad CRC"):
            load(path)
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    finally:
        tracemalloc.stop()


def test_a_member_that_claims_more_than_an_image_is_not_unpacked(tmp_path, monkeypatch):
    path = patched(write_zip(tmp_path / "set.zip"), (CENTRAL, 24, "<I", 2**31))
    monkeypatch.setattr(reading, "_map_in_processes", lambda *_: pytest.fail("taken for much to decode"))
    assert load(path, max_bad_images=1).bad_images == [["00000.png", "larger than 100 MiB"]]


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_methods_than_deflate_are_not_unpacked(tmp_path, method):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("0.png", encoded(IMAGES[0]), method)
        archive.writestr("1.png", encoded(IMAGES[1]))
    pack = load(path, max_bad_images=1)
    assert pack.bad_images == [["0.png", "packed by another method than deflate"]]
    np.testing.assert_array_equal(pack.images, IMAGES[1:2])
    with zipfile.ZipFile(tmp_path / "set.npz", "w", method) as archive:
        archive.writestr("arr_0.npy", b"")
    with pytest.raises(UserError, match="another method"):
        find_source(tmp_path / "set.npz", 8)


def test_a_list_of_members_that_hides_some_is_an_error(tmp_path):
    path = write_zip(tmp_path / "set.zip")
    length = 46 + len("00001.png")
    patched(path, (CENTRAL, 32, "<H", length))  # the first one's comment, which takes in the second
    with zipfile.ZipFile(path) as archive:
        assert len(archive.namelist()) == len(IMAGES) - 1
    with pytest.raises(UserError, match="not a complete zip"):
        find_source(path, 8)


def test_a_damaged_name_does_not_lose_an_image_in_silence(tmp_path):
    path = patched(write_zip(tmp_path / "set.zip"), (CENTRAL, 46 + 8, "<B", ord("x")))  # 00000.pnx
    with pytest.raises(UserError, match=r"is damaged: .*differ"):
        find_source(path, 8)


def test_a_name_with_a_zero_byte_is_passed_over_and_told(tmp_path):
    path = write_zip(tmp_path / "set.zip")
    patched(path, (CENTRAL, 46, "<B", 0), (LOCAL, 30, "<B", 0))
    source = find_source(path, 8)
    assert len(source.ids) == len(IMAGES) - 1
    assert "zero byte" in source.notes[0]


def test_text_out_of_files_is_printable():
    assert printable("a\x1b[2J\nb\u202eé人") == "a\\x1b[2J\\nb\\u202eé人"
    assert len(printable("x" * 10_000)) < 210


def test_names_do_not_reach_the_terminal_as_they_are(tmp_path, capsys):
    path = tmp_path / "set.zip"
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        archive.writestr("\x1b[2J\n0.png", b"no image")
        archive.writestr("1.png", encoded(IMAGES[1]))
    with pytest.raises(UserError, match="1 unusable") as error:
        load(path)
    assert "\x1b" not in str(error.value) and "\n" not in str(error.value)
    assert "\x1b" not in (tmp_path / "set.zip-8px.packed.report.txt").read_text()


def test_file_names_that_are_no_utf_8_are_read(tmp_path):
    path = write_folder(tmp_path / os.fsdecode(b"set\xff"), IMAGES[:2])
    (path / os.fsdecode(b"\xfe.png")).write_bytes(b"no image")
    (path / os.fsdecode(b"\xfd.png")).write_bytes(encoded(IMAGES[2]))
    pack = load(path, max_bad_images=1)
    assert pack.ids == ["00000.png", "00001.png", "\udcfd.png"]
    assert load(path, max_bad_images=1).ids == pack.ids  # from the record beside it
    assert hash_ids(pack.ids) != hash_ids(pack.ids[:2])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("(1000000000000, 8, 8, 3)", "not as large as it says"),  # before anything is counted by it
        ("(9, 8, 8, 3)", "not as large as it says"),
        ("(1, 100000, 100000, 3)", "100000x100000 pixels"),
        ("(-10, 8, 8, 3)", "exactly one"),
        ("(" * 500, "broken array"),
        ("(10, 8, 8, 3", "broken array"),
    ],
)
def test_an_array_that_lies_about_its_shape_is_an_error(tmp_path, shape, message):
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    header = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text
    with zipfile.ZipFile(tmp_path / "set.npz", "w") as archive:
        archive.writestr("arr_0.npy", header + IMAGES.tobytes())
    with pytest.raises(UserError, match=message) as error:
        find_source(tmp_path / "set.npz", 8)
    assert str(tmp_path / "set.npz") in str(error.value)
