"""What the tests of data share: ten small images, and files of every kind to hold them."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import packed
from data.datasets import load_images
from data.packed import open_packed
from data.sources import find_source
from functions.support.errors import UserError


def random_pixels(*shape):
    """Return random uint8 values of a shape."""
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


IMAGES = random_pixels(10, 8, 8, 3)

# This is FFHQ's own layout, but the images of a folder do not follow each other.
TREE = "{folder:05d}/{number:05d}.png"


def encoded(image, image_format="PNG", **options):
    """Return the bytes of an image file; the image is an array or Pillow's."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


PICTURE = encoded(IMAGES[0])


def write_zip(path, images=IMAGES, pattern="{number:05d}.png", more=(), mode="w", **options):
    """Write the images and the files of `more` (bytes by name) to a zip; return its path."""
    with zipfile.ZipFile(path, mode, **options) as archive:
        # The last image comes first, so neither a directory's nor an archive's own order is right.
        for number, image in reversed([*enumerate(images)]):
            name = pattern.format(folder=number % 4, number=number)
            image_format = Image.registered_extensions()[Path(name).suffix.lower()]
            archive.writestr(name, encoded(image, image_format))
        for name, data in dict(more).items():
            archive.writestr(name, data)
    return path


def write_folder(path, images=IMAGES, pattern="{number:05d}.png", more=()):
    """Unpack what `write_zip` writes to a folder; return its path."""
    archive = write_zip(io.BytesIO(), images, pattern, more)
    zipfile.ZipFile(archive).extractall(path)
    return path


def load(path, size=8, max_bad_images=0):
    """Return the images of a folder or an archive, by way of a packed file."""
    return open_packed(find_source(path), (3, size, size), max_bad_images)


def labels_of(path):
    """Return the label of each image, or why there is none."""
    try:
        image_set = load_images(path, 8, labels=True)
    except UserError as error:
        return str(error)
    return ", ".join(image_set.label_names[k] for k in image_set.inputs["label"])


def packed_files(folder):
    """Return the sorted names of packed files in a folder, and of what belongs to them."""
    return sorted(path.name for path in folder.iterdir() if ".packed" in path.name)


def forbid_decoding(monkeypatch):
    """Make the test fail if an image is decoded from now on."""
    monkeypatch.setattr(packed, "map_images", lambda *_: pytest.fail("decoded again"))
