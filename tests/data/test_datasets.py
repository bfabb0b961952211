"""data/datasets.py: the sets by name, wherever a copy lies, and the splits by id."""

import hashlib
import io
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data import datasets
from data.datasets import ImageSet, load_images, split_images
from functions.support.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def data_folder(tmp_path, monkeypatch):
    """A data folder of the test's own, so that nothing is written beside the modules."""
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(datasets.EMBEDDED_SET, folder)
    monkeypatch.setattr(datasets, "DATA_FOLDER", folder)
    monkeypatch.setattr(datasets, "EMBEDDED_SET", folder / datasets.EMBEDDED_SET.name)
    return folder


def write_tree(root):
    for number, image in enumerate(IMAGES):
        path = root / f"{number - number % 4:05d}" / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def write_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        for number, image in enumerate(IMAGES):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG")
            archive.writestr(f"thumbnails128x128/{number:05d}.png", buffer.getvalue())


def test_the_embedded_set_and_the_people_in_it(data_folder):
    everyone = load_images("emoji_faces", 64, quiet=True)
    people = load_images("emoji_people", 64, quiet=True)
    assert everyone.images.shape == (1038, 64, 64, 3) and everyone.images.dtype == np.uint8
    assert everyone.ids == sorted(everyone.ids)
    assert people.images.shape == (901, 64, 64, 3) and people.name == "emoji_people"
    assert people.ids == [name for name in everyone.ids if name.startswith("people_")]
    with zipfile.ZipFile(datasets.EMBEDDED_SET) as archive:
        for position in (0, 450, 900):
            original = Image.open(io.BytesIO(archive.read(people.ids[position])))
            np.testing.assert_array_equal(people.images[position], np.asarray(original))


@pytest.mark.parametrize(
    "put",
    [
        lambda data: write_tree(data / "FFHQ"),
        lambda data: write_tree(data / "FFHQ" / "thumbnails128x128"),
        lambda data: write_zip(data / "FFHQ.zip"),
        lambda data: np.savez(data / "FFHQ.npz", IMAGES),
        lambda data: ((data / "FFHQ").mkdir(), write_zip(data / "FFHQ" / "archive.zip")),
        lambda data: ((data / "FFHQ").mkdir(), np.savez(data / "FFHQ" / "thumbs.npz", IMAGES)),
        lambda data: ((data / "FFHQ").mkdir(), write_zip(data / "FFHQ.zip")),
    ],
    ids=["tree", "official", "zip beside", "npz beside", "zip inside", "npz inside", "zip beside an empty folder"],
)
def test_ffhq_is_found_in_every_place(data_folder, put):
    put(data_folder)
    image_set = load_images("FFHQ", 8, quiet=True)
    np.testing.assert_array_equal(image_set.images, IMAGES)
    assert image_set.ids == list(range(6)) and image_set.name == "FFHQ"


def test_ffhq_is_found_again_once_its_folder_holds_the_pack(data_folder):
    write_tree(data_folder / "FFHQ")
    for _ in range(2):
        assert load_images("FFHQ", 8, quiet=True).ids == list(range(6))


def test_missing_ffhq_says_how_to_get_it(data_folder):
    with pytest.raises(UserError) as error:
        load_images("FFHQ", 8)
    assert len(str(error.value).splitlines()) == 2
    assert "download_ffhq.py" in str(error.value) and str(data_folder / "FFHQ") in str(error.value)


def test_two_archives_are_not_guessed_between(data_folder):
    (data_folder / "FFHQ").mkdir()
    for name in ("a.zip", "b.zip"):
        write_zip(data_folder / "FFHQ" / name)
    with pytest.raises(UserError, match=r"a\.zip, b\.zip"):
        load_images("FFHQ", 8)


def test_a_path_is_a_set(tmp_path):
    write_tree(tmp_path / "faces")
    image_set = load_images(str(tmp_path / "faces"), 4, quiet=True)
    assert image_set.images.shape == (6, 4, 4, 3) and len(image_set) == 6
    with pytest.raises(UserError, match="does not exist"):
        load_images(str(tmp_path / "nothing"), 4)


def set_of(ids):
    return ImageSet("set", np.empty((len(ids), 1, 1, 3), np.uint8), ids)


@pytest.mark.parametrize(("name", "train_count"), [("reference", 63_000), ("official", 60_000)])
def test_the_full_set_has_two_splits(name, train_count):
    split = split_images(set_of(list(range(70_000))), name)
    np.testing.assert_array_equal(split.train_indices, np.arange(train_count))
    np.testing.assert_array_equal(split.val_indices, np.arange(train_count, 70_000))
    assert name in split.description and f"{train_count:,}" in split.description
    listed = "\n".join(str(i) for i in range(train_count))
    assert split.train_ids_hash == hashlib.sha256(listed.encode()).hexdigest()[:16]


@pytest.mark.parametrize("ids", [list(range(69_999)), list(range(1, 70_001)), [str(i) for i in range(70_000)]])
def test_what_is_not_the_full_set_gives_its_last_tenth(ids):
    split = split_images(set_of(ids), "official")
    assert len(split.val_indices) == len(ids) // 10
    assert "last 10%" in split.description and "\n" not in split.description


@settings(deadline=None, max_examples=50)
@given(
    ids=st.one_of(
        st.sets(st.integers(0, 10**6), min_size=2, max_size=300), st.sets(st.text(min_size=1), min_size=2, max_size=60)
    ),
    name=st.sampled_from(["reference", "official"]),
)
def test_every_split_is_a_partition_by_sorted_id(ids, name):
    ids = sorted(ids)
    split = split_images(set_of(ids), name)
    train, val = split.train_indices, split.val_indices
    assert train.dtype == val.dtype == np.int64
    assert train.tolist() + val.tolist() == list(range(len(ids)))
    assert len(train) >= 1 and len(val) == max(1, len(ids) // 10)
    assert ids[train[-1]] < ids[val[0]]
    again = split_images(set_of(list(ids)), name)
    assert (again.train_ids_hash, again.val_ids_hash) == (split.train_ids_hash, split.val_ids_hash)


def test_hashes_tell_sets_apart():
    hashes = {
        split_images(set_of(ids), "reference").train_ids_hash
        for ids in ([1, 2, 3], [1, 4, 5], [1, 23, 4], [12, 13, 14])
    }
    assert len(hashes) == 4


def test_an_empty_side_or_an_unknown_split_is_an_error():
    with pytest.raises(UserError, match="too few"):
        split_images(set_of([7]), "reference")
    with pytest.raises(UserError, match=r"'mine'.*'reference' or 'official'"):
        split_images(set_of([1, 2]), "mine")


def test_importing_prints_nothing_and_draws_nothing():
    code = (
        "import random, numpy, torch\n"
        "before = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()\n"
        "import data.augmentation, data.batches, data.datasets, data.decode, data.packed, data.pixels\n"
        "import data.prepare, data.sources\n"
        "assert before == (random.getstate(), numpy.random.get_state()[1].tolist(), "
        "torch.get_rng_state().tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
