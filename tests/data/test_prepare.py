"""data/prepare.py, as a user calls it."""

import hashlib
import json
import runpy
import sys
from importlib.machinery import PathFinder

import pytest

from data import prepare
from data.sources import find_source
from functions.support.errors import UserError
from tests.conftest import script
from tests.data.packing import IMAGES, ROOT, encoded, random_pixels, write_folder, write_npz


def photo(number, size=128):
    """Return random pixels, which depend on the number alone."""
    return random_pixels(size, size, 3, seed=number)


def md5(pixels):
    return hashlib.md5(pixels.tobytes()).hexdigest()


PHOTOS = [photo(number) for number in range(6)]
LARGE = photo(0, 1024)


@pytest.fixture
def sums(tmp_path):
    """Return the json that describes a small FFHQ, in the form of the real one."""
    entries = {}
    for number, pixels in enumerate(PHOTOS):
        entries[str(number)] = {
            "metadata": {"photo_url": "https://example.org", "license": "CC0"},
            "image": {
                "file_path": "",
                "pixel_size": [1024, 1024],
                "pixel_md5": md5(LARGE) if number == 0 else "1",
            },
            "thumbnail": {
                "file_size": 1,
                "file_md5": "0",
                "pixel_size": [128, 128],
                "pixel_md5": md5(pixels),
            },
            "in_the_wild": {
                "pixel_size": [2000, 1500],
                "pixel_md5": "0",
                "face_rect": [0, 1, 2, 3],
            },
        }
    path = tmp_path / "ffhq-dataset-v2.json"
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture
def ffhq(tmp_path):
    """Return a folder with a right copy of the small FFHQ."""
    return write_folder(tmp_path / "thumbnails128x128", PHOTOS, "00000/{number:05d}.png")


@pytest.mark.slow
def test_the_script_prepares_from_any_folder_or_ends_with_one_line(ffhq, tmp_path):
    prepare_script = ROOT / "data" / "prepare.py"

    done = script(prepare_script, ffhq.name, "--image-size", 64, cwd=tmp_path)
    # A progress bar is no error.
    assert done.returncode == 0, done.stderr
    assert "error:" not in done.stderr
    assert "6 images at 64x64, 0 left out" in done.stdout
    assert (ffhq / "thumbnails128x128-64px.packed").stat().st_size == 6 * 64 * 64 * 3

    done = script(prepare_script, tmp_path / "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert "nowhere" in done.stderr


def test_the_script_hides_no_package_by_the_modules_beside_it(tmp_path, monkeypatch):
    """Hugging Face's `datasets`, an empty one here, has the name of one of them."""
    package = tmp_path / "datasets" / "__init__.py"
    package.parent.mkdir()
    package.touch()
    # Python puts the folder of a script first.
    path = [str(ROOT / "data"), *sys.path, str(tmp_path)]
    monkeypatch.setattr(sys, "path", path)
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--help"])

    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(ROOT / "data" / "prepare.py", run_name="__main__")
    assert PathFinder.find_spec("datasets").origin == str(package)
    assert sys.path == [str(ROOT), *path[1:]]


def test_so_many_bad_images_may_be_left_out(ffhq):
    (ffhq / "00000" / "00003.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"00003\.png"):
        prepare.main([str(ffhq)])
    assert prepare.main([str(ffhq), "--max-bad-images", "1"]) == 0


def test_a_right_copy_is_verified_then_prepared(ffhq, sums, capsys):
    assert prepare.main([str(ffhq), "--verify", str(sums)]) == 0
    assert "6 correct, 0 wrong, 0 missing, 0 extra" in capsys.readouterr().out
    assert (ffhq / "thumbnails128x128-128px.packed").exists()


def test_wrong_missing_and_extra_images_are_named(ffhq, sums, capsys):
    # Image 1 has one wrong bit in one pixel.
    changed = photo(1)
    changed[64, 64, 0] ^= 1
    folder = ffhq / "00000"
    (folder / "00001.png").write_bytes(encoded(changed))

    # Image 2 is missing, and image 3 is no image.
    (folder / "00002.png").unlink()
    (folder / "00003.png").write_bytes(b"broken")

    # Image 4 has the same bytes in another shape.
    reshaped = PHOTOS[4].reshape(64, 256, 3)
    (folder / "00004.png").write_bytes(encoded(reshaped))

    # Image 9 is one too many.
    (folder / "00009.png").write_bytes(encoded(photo(9)))

    assert prepare.main([str(ffhq), "--verify", str(sums)]) == 1
    right = [f"128x128 with {md5(pixels)} or 1024x1024 with 1" for pixels in PHOTOS]
    assert capsys.readouterr().out.splitlines() == [
        "2 correct, 3 wrong, 1 missing, 1 extra",
        f"  wrong: 00000/00001.png: is 128x128 with pixel_md5 {md5(changed)}, not {right[1]}",
        "  wrong: 00000/00003.png: not a PNG, JPEG, WEBP, BMP image",
        f"  wrong: 00000/00004.png: is 256x64 with pixel_md5 {md5(PHOTOS[4])}, not {right[4]}",
        "  missing: id 2",
        "  extra: id 9",
    ]

    # A wrong copy is not prepared.
    assert not list(ffhq.glob("*.packed"))


def test_copies_of_other_forms_and_the_large_photos_verify_too(sums, tmp_path):
    for path, correct in (
        (write_npz(tmp_path / "a.npz", PHOTOS), 6),
        (write_folder(tmp_path / "flat", PHOTOS, "{number:05d}.bmp"), 6),
        # Of the large photos only the first is there.
        (write_folder(tmp_path / "large", [LARGE], "{number:05d}.bmp"), 1),
    ):
        names = prepare.verify(find_source(path, 128), sums)
        assert [len(listed) for listed in names.values()] == [correct, 0, 6 - correct, 0]


def test_images_of_an_npz_are_named_by_their_numbers(sums, tmp_path):
    # All images moved up by one, so each is wrong.
    path = write_npz(tmp_path / "b.npz", PHOTOS[1:])
    names = prepare.verify(find_source(path, 128), sums)
    wrong = [name.partition(":")[0] for name in names["wrong"]]
    assert wrong == ["image 0", "image 1", "image 2", "image 3", "image 4"]


ENTRIES = ("{}", '{"thumbnail": {}}', '{"thumbnail": {"pixel_md5": "0"}}', "1")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", "3", *(f'{{"{key}": {entry}}}' for key in "a0" for entry in ENTRIES)],
)
def test_another_json_is_refused(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError, match="not a complete ffhq-dataset"):
        prepare.read_expected(path)


def test_no_json_and_images_without_numbers_are_errors(sums, tmp_path):
    folder = write_folder(tmp_path / "named", IMAGES, "a{number}b.png")
    source = find_source(folder, 128)
    with pytest.raises(UserError, match="no numbers"):
        prepare.verify(source, sums)
    with pytest.raises(UserError, match="cannot be read"):
        prepare.verify(source, tmp_path / "none.json")
