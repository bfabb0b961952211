"""data/prepare.py, as a user calls it."""

import hashlib
import json

import pytest

from data import prepare
from tests.conftest import script
from tests.data.packing import ROOT, encoded, random_pixels, write_folder, write_npz

PHOTOS = random_pixels(6, 128, 128, 3)
LARGE = random_pixels(1024, 1024, 3)


def md5(pixels):
    return hashlib.md5(pixels.tobytes()).hexdigest()


@pytest.fixture
def sums(tmp_path):
    """Return the json that describes a small FFHQ, in the form of the real one."""
    entries = {
        str(number): {
            "category": "training",
            "image": {"pixel_md5": md5(LARGE) if number == 0 else "1"},
            "thumbnail": {"pixel_size": [128, 128], "pixel_md5": md5(pixels)},
        }
        for number, pixels in enumerate(PHOTOS)
    }
    path = tmp_path / "ffhq-dataset-v2.json"
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture
def ffhq(tmp_path):
    """Return a folder with a right copy of the small FFHQ."""
    return write_folder(tmp_path / "thumbnails128x128", PHOTOS, "00000/{number:05d}.png")


@pytest.mark.slow
def test_the_script_prepares_from_any_folder(ffhq, tmp_path):
    done = script(ROOT / "data" / "prepare.py", ffhq.name, "--image-size", 64, cwd=tmp_path)
    # A progress bar is no error.
    assert done.returncode == 0, done.stderr
    assert "error:" not in done.stderr
    assert "6 images at 64x64, 0 left out" in done.stdout
    assert (ffhq / "thumbnails128x128-64px.packed").stat().st_size == 6 * 64 * 64 * 3


def test_a_right_copy_of_any_form_is_verified_then_prepared(ffhq, sums, tmp_path, capsys):
    flat = write_folder(tmp_path / "flat", PHOTOS, "{number:05d}.bmp")
    for path in (ffhq, flat, write_npz(tmp_path / "a.npz", PHOTOS)):
        assert prepare.main([str(path), "--verify", str(sums)]) == 0
        printed = capsys.readouterr().out
        assert "6 images; wrong, extra or missing: 0" in printed
        assert "Ready" in printed
    # Of the large photos only the first is there.
    large = write_folder(tmp_path / "large", [LARGE], "{number:05d}.bmp")
    assert prepare.main([str(large), "--verify", str(sums)]) == 1
    assert "1 images; wrong, extra or missing: 5" in capsys.readouterr().out


def test_wrong_missing_and_extra_images_are_named(ffhq, sums, capsys):
    # Image 1 has one wrong bit in one pixel.
    changed = PHOTOS[1].copy()
    changed[64, 64, 0] ^= 1
    folder = ffhq / "00000"
    (folder / "00001.png").write_bytes(encoded(changed))

    # Image 2 is missing, image 3 is no image, and image 9 is one too many.
    (folder / "00002.png").unlink()
    (folder / "00003.png").write_bytes(b"broken")
    (folder / "00009.png").write_bytes(encoded(PHOTOS[0]))

    assert prepare.main([str(ffhq), "--verify", str(sums)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "6 images; wrong, extra or missing: 4",
        f"wrong or extra: 00000/00001.png: {md5(changed)}",
        "wrong or extra: 00000/00003.png: not a PNG, JPEG, WEBP, BMP, GIF image",
        f"wrong or extra: 00000/00009.png: {md5(PHOTOS[0])}",
        "missing: 2",
    ]

    # A wrong copy is not prepared.
    assert not list(ffhq.glob("*.packed"))


def test_bad_input_is_one_line_and_exit_code_2(ffhq, tmp_path, capsys):
    missing = str(tmp_path / "nowhere")
    for arguments in ([missing], [str(ffhq), "--verify", missing]):
        with pytest.raises(SystemExit, match="2"):
            prepare.main(arguments)
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert "nowhere" in error
