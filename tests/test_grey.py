"""Networks with one channel, from image files to pictures; and that three channels stay as ever."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

import edit
import evaluate
import sample
from data.datasets import load_images
from tests.conftest import call
from tests.data.packing import IMAGES, write_folder

FEW = "--steps 12 --device cpu"


def test_grey_packs_lie_beside_those_of_colours(tmp_path):
    path = write_folder(tmp_path / "set")
    colour = load_images(path, 8)
    grey = load_images(path, 8, channels=1)

    # This is the luma of ITU-R BT.601.
    assert_allclose(grey.images, IMAGES @ [[0.299], [0.587], [0.114]], atol=1)
    names = [pack.images.filename.name for pack in (colour, grey)]
    assert names == ["set-8px.packed", "set-8px-grey.packed"]

    # A network with three channels sees grey as three equal ones.
    seen = load_images(write_folder(tmp_path / "grey", grey.images.squeeze(3)), 8).images
    assert_array_equal(seen, np.repeat(grey.images, 3, axis=3))


@pytest.mark.slow
def test_samples_of_a_grey_network_are_grey_and_it_is_evaluated(grey_run, pictures, tmp_path):
    call(sample, grey_run, FEW, "--n 2 --gif --out", tmp_path)
    assert Image.open(tmp_path / "grid.png").mode == "L"

    # This file has colours.
    picture, mask = pictures / "00001.png", tmp_path / "mask.webp"
    Image.fromarray(255 * np.eye(20, dtype=np.uint8)).save(mask, lossless=True)
    call(edit, "inpaint", picture, grey_run, FEW, "--n 1 --mask", mask, "--out", tmp_path)
    figures = [file for file in tmp_path.iterdir() if file.suffix in (".png", ".gif")]
    assert len(figures) == 3
    for file in figures:
        red, green, blue = Image.open(file).convert("RGB").split()
        assert red == green == blue

    call(evaluate, grey_run, "--images 2 --t-stride 20 --device cpu --out", tmp_path)
    assert [*tmp_path.glob("*-bpd-*.json")]
