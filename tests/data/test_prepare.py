"""data/prepare.py, as a user calls it."""

import pytest

from tests.conftest import ROOT, script
from tests.data.packing import random_pixels, write_folder


@pytest.mark.slow
def test_the_script_prepares_from_any_folder(tmp_path):
    write_folder(tmp_path / "photos", random_pixels(6, 20, 20, 3))
    done = script(ROOT / "data" / "prepare.py", "photos --image-size 16 --channels 1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "6 images at 16x16, 0 left out" in done.stdout
    assert (tmp_path / "photos" / "photos-16px-grey.packed").stat().st_size == 6 * 16 * 16
