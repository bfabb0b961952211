"""data/arrays.py: images of any array or Dataset train as those in memory do."""

import h5py
import numpy as np
import pytest
import zarr
from PIL import Image
from torch.utils.data import Dataset

import train
from data.arrays import from_array, from_dataset
from tests.conftest import load_checkpoint
from tests.small_training import same
from tests.test_own_parts import PIXELS, own_run

BRIGHTNESS = PIXELS.mean((1, 2, 3), np.float32) / 255


class Photos(Dataset):
    """A Dataset of Pillow's images, each with its brightness."""

    def __len__(self):
        return len(PIXELS)

    def __getitem__(self, index):
        return Image.fromarray(PIXELS[index]), {"brightness": BRIGHTNESS[index]}


def mapped(path):
    PIXELS.tofile(path)
    return np.memmap(path, np.uint8, "r", shape=PIXELS.shape)


def of_hdf5(path):
    return h5py.File(path, "w").create_dataset("images", data=PIXELS, chunks=(7, 8, 8, 3))


def of_zarr(path):
    array = zarr.create_array(path, shape=PIXELS.shape, chunks=(7, 8, 8, 3), dtype="uint8")
    array[:] = PIXELS
    return array


def set_of(kind, path):
    """Return a set of PIXELS and BRIGHTNESS, with the images in such an array."""
    if kind is Photos:
        return from_dataset("mine", Photos())
    return from_array("mine", kind(path), inputs={"brightness": BRIGHTNESS})


def trained(images, folder):
    """Return the last checkpoint of a run of two epochs, but for its times."""
    run = own_run(folder, images=images)
    assert train.train(run)
    saved = load_checkpoint(max(run.folder.glob("checkpoints/*")))
    return {key: saved[key] for key in ("model", "ema")}, run.data.split.hashes


@pytest.fixture(scope="module")
def of_memory(tmp_path_factory):
    """Return what `trained` does with the images in memory."""
    images = from_array("mine", PIXELS, inputs={"brightness": BRIGHTNESS})
    return trained(images, tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("kind", [mapped, of_hdf5, of_zarr, Photos])
def test_equal_pixels_give_equal_runs(kind, of_memory, tmp_path):
    images = set_of(kind, tmp_path / "images")
    assert type(images.images) is not np.ndarray
    assert same(trained(images, tmp_path), of_memory)
