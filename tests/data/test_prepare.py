"""data/prepare.py, as a user calls it."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import prepare
from data.prepare import read_expected, verify
from data.sources import find_source
from functions.support.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
COUNT = 6


def photo(number, size=128):
    return np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)


@pytest.fixture
def ffhq(tmp_path):
    """A small copy of FFHQ and the json that describes it, in the form of the real one."""
    entries = {}
    for number in range(COUNT):
        path = tmp_path / "thumbnails128x128" / "00000" / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo(number)).save(path)
        entries[str(number)] = {
            "category": "training",
            "metadata": {"photo_url": "https://example.org", "license": "CC0"},
            "image": {
                "file_path": "",
                "pixel_size": [1024, 1024],
                "face_landmarks": [[1.5, 2.5]],
                "pixel_md5": hashlib.md5(photo(number, 1024).tobytes()).hexdigest(),
            },
            "thumbnail": {
                "file_path": path.name,
                "file_size": 1,
                "file_md5": "0",
                "pixel_size": [128, 128],
                "pixel_md5": hashlib.md5(photo(number).tobytes()).hexdigest(),
            },
            "in_the_wild": {"pixel_size": [2000, 1500], "pixel_md5": "0", "face_rect": [0, 1, 2, 3]},
        }
    json_path = tmp_path / "ffhq-dataset-v2.json"
    json_path.write_text(json.dumps(entries))
    return tmp_path / "thumbnails128x128", json_path


def run(*arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, str(ROOT / "data" / "prepare.py"), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_script_prepares_from_any_folder(ffhq, tmp_path):
    done = run(ffhq[0].name, "--image-size", 64, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "6 images at 64x64, 0 left out" in done.stdout
    assert (ffhq[0] / "thumbnails128x128-64px.packed").stat().st_size == 6 * 64 * 64 * 3


def test_errors_are_one_line_and_exit_code_2(ffhq, tmp_path):
    done = run(tmp_path / "nowhere")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "nowhere" in done.stderr
    (ffhq[0] / "00000" / "00003.png").write_bytes(b"")
    done = run(ffhq[0])
    assert done.returncode == 2 and "00003.png" in done.stderr and "Traceback" not in done.stderr
    assert run(ffhq[0], "--max-bad-images", 1).returncode == 0


def test_a_right_copy_is_verified_then_prepared(ffhq, capsys):
    folder, json_path = ffhq
    assert prepare.main([str(folder), "--verify", str(json_path)]) == 0
    assert "6 correct, 0 wrong, 0 missing, 0 extra" in capsys.readouterr().out
    assert (folder / "thumbnails128x128-128px.packed").exists()


def test_wrong_missing_and_extra_images_are_named(ffhq, capsys):
    folder, json_path = ffhq
    files = folder / "00000"
    changed = photo(1)
    changed[64, 64, 0] ^= 1  # one bit of one pixel
    Image.fromarray(changed).save(files / "00001.png")
    (files / "00002.png").unlink()
    (files / "00003.png").write_bytes(b"broken")
    Image.fromarray(photo(4, 100)).save(files / "00004.png")
    Image.fromarray(photo(9)).save(files / "00009.png")
    names = verify(find_source(folder, 128), json_path)
    assert names["correct"] == ["00000/00000.png", "00000/00005.png"]
    assert names["missing"] == ["id 2"] and names["extra"] == ["id 9"]
    assert [name.partition(":")[0] for name in names["wrong"]] == [f"00000/0000{n}.png" for n in (1, 3, 4)]
    assert "is 100x100 with pixel_md5" in names["wrong"][2] and "not 128x128 with" in names["wrong"][2]
    assert prepare.main([str(folder), "--verify", str(json_path)]) == 1
    printed = capsys.readouterr().out
    for line in (
        "wrong: 00000/00001.png: is 128x128 with pixel_md5",
        "missing: id 2",
        "extra: id 9",
        "2 correct, 3 wrong",
    ):
        assert line in printed
    assert not list(folder.glob("*.packed"))


def test_reencoded_and_packed_copies_verify_too(ffhq, tmp_path):
    np.savez(tmp_path / "a.npz", np.stack([photo(n) for n in range(COUNT)]))
    for number in range(COUNT):
        (tmp_path / "flat").mkdir(exist_ok=True)
        Image.fromarray(photo(number)).save(tmp_path / "flat" / f"{number:05d}.bmp")
    for path in (tmp_path / "a.npz", tmp_path / "flat"):
        names = verify(find_source(path, 128), ffhq[1])
        assert [len(listed) for listed in names.values()] == [COUNT, 0, 0, 0]


def test_the_large_photos_are_checked_against_their_own_sums(ffhq, tmp_path):
    (tmp_path / "large").mkdir()
    Image.fromarray(photo(0, 1024)).save(tmp_path / "large" / "00000.png", compress_level=0)
    names = verify(find_source(tmp_path / "large", 128), ffhq[1])
    assert names["correct"] == ["00000.png"] and not names["wrong"] and len(names["missing"]) == 5


def test_an_npz_names_its_wrong_images(ffhq, tmp_path):
    np.savez(tmp_path / "a.npz", np.stack([photo(n + 1) for n in range(2)]))
    names = verify(find_source(tmp_path / "a.npz", 128), ffhq[1])
    assert [name.partition(":")[0] for name in names["wrong"]] == ["image 0", "image 1"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        "3",
        '{"a": 1}',
        '{"0": {}}',
        '{"0": {"thumbnail": {}}}',
        '{"x": {"thumbnail": {"pixel_md5": "0", "pixel_size": [1, 1]}}}',
        '{"0": {"thumbnail": {"pixel_md5": "0"}}}',
    ],
)
def test_another_json_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match="not a complete ffhq-dataset"):
        read_expected(tmp_path / "a.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_expected(tmp_path / "none.json")


def test_images_without_numbers_cannot_be_verified(ffhq, tmp_path):
    (tmp_path / "named").mkdir()
    Image.fromarray(photo(0)).save(tmp_path / "named" / "a1b.png")
    with pytest.raises(UserError, match="no numbers"):
        verify(find_source(tmp_path / "named", 128), ffhq[1])
