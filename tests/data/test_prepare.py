"""data/prepare.py, as a user calls it."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from tests.conftest import ROOT, script
from tests.data.packing import IMAGES, write_folder


@pytest.mark.slow
def test_the_script_prepares_from_any_folder(tmp_path):
    path = write_folder(tmp_path / "photos")
    done = script(ROOT / "data" / "prepare.py", "photos --image-size 8 --channels 1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "10 images at 8x8, 0 left out" in done.stdout
    pixels = np.load(path / "photos-8px-grey.packed.npy")[..., 0]
    # This is the luma of ITU-R BT.601.
    assert_allclose(pixels, IMAGES @ [0.299, 0.587, 0.114], atol=1)
