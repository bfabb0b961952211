"""What the tests of data share: ten small images, and files of every kind to hold them."""

import io
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import packed
from data.packed import open_packed
from data.sources import find_source

ROOT = Path(__file__).resolve().parents[2]
IMAGES = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
TREE = "{folder:05d}/{number:05d}.png"  # as FFHQ has it, with 4 images a folder instead of 1,000


def encoded(image, image_format="PNG", **options):
    """The bytes of an image file; the image is an array or Pillow's."""
    buffer = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width, height, bit_depth, colour_type, rows, extra=b""):
    """A PNG put together by hand from its filtered rows, independent of any encoder."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + extra
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def files_of(images, pattern, more):
    """Names and bytes, backwards, so that neither a directory's nor an archive's own order is the right one."""
    for number in reversed(range(len(images))):
        name = pattern.format(folder=number - number % 4, number=number, mixed=number % 4)
        yield (
            name,
            encoded(images[number], Image.registered_extensions()[Path(name).suffix.lower()]),
        )
    yield from dict(more).items()


def write_folder(path, images=IMAGES, pattern="{number:05d}.png", more=()):
    for name, data in files_of(images, pattern, more):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def write_zip(path, images=IMAGES, pattern="{number:05d}.png", more=()):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files_of(images, pattern, more):
            archive.writestr(name, data)
    return path


def write_npz(path, images=IMAGES):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, images)
    return path


def load(path, size=8, **options):
    return open_packed(find_source(path, size), size, **options)


def packed_files(folder):
    return sorted(path.name for path in folder.iterdir() if ".packed" in path.name)


def forbid_decoding(monkeypatch):
    monkeypatch.setattr(packed, "map_images", lambda *_: pytest.fail("decoded again"))
