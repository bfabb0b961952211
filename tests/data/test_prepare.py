"""data/prepare.py, as a user calls it."""

import pytest

from tests.conftest import ROOT, script
from tests.data.packing import random_pixels, write_folder

PHOTOS = random_pixels(6, 128, 128, 3)


@pytest.mark.slow
def test_the_script_prepares_from_any_folder(tmp_path):
    ffhq = write_folder(tmp_path / "thumbnails128x128", PHOTOS, "00000/{number:05d}.png")
    done = script(ROOT / "data" / "prepare.py", ffhq.name, "--image-size 64", cwd=tmp_path)
    # A progress bar is no error.
    assert done.returncode == 0, done.stderr
    assert "error:" not in done.stderr
    assert "6 images at 64x64, 0 left out" in done.stdout
    assert (ffhq / "thumbnails128x128-64px.packed").stat().st_size == 6 * 64 * 64 * 3
