"""Networks with one channel, from samples to pictures and their evaluation."""

import numpy as np
import pytest
from PIL import Image

import edit
import evaluate
import sample
from tests.conftest import call

FEW = "--steps 12 --device cpu"


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
