"""What the tests of packed files share: sources of ten small images."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import packed
from data.packed import open_packed
from data.sources import find_source

ROOT = Path(__file__).resolve().parents[2]
IMAGES = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)


def write_folder(path, images=IMAGES):
    path.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(path / f"{number:05d}.png")
    return path


def write_zip(path, images=IMAGES):
    with zipfile.ZipFile(path, "w") as archive:
        for number, image in enumerate(images):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG")
            archive.writestr(f"{number:05d}.png", buffer.getvalue())
    return path


def load(path, size=8, **options):
    return open_packed(find_source(path, size), size, quiet=True, **options)


def packed_files(folder):
    return sorted(path.name for path in folder.iterdir() if ".packed" in path.name)


def forbid_decoding(monkeypatch):
    monkeypatch.setattr(packed, "map_images", lambda *_: pytest.fail("decoded again"))
