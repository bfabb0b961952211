"""data/datasets.py: the sets by name, wherever a copy lies, and the rules of their splits."""

import hashlib
import shutil
import zipfile

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image

from data import datasets
from data.datasets import ImageSet, load_images, split_images
from tests.conftest import refused
from tests.data.packing import IMAGES, PICTURE, TREE, write_folder, write_zip


def test_the_embedded_set_and_the_people_in_it(tmp_path, monkeypatch):
    # Nothing is written beside the modules.
    copy = shutil.copy(datasets.EMBEDDED_SET, tmp_path)
    monkeypatch.setattr(datasets, "EMBEDDED_SET", copy)
    everyone = load_images("emoji_faces", 64)
    people = load_images("emoji_people", 64)
    assert people.name == "emoji_people"

    # Runs of earlier versions name these hashes. The pixels have the pack's.
    split = split_images(people, "reference")
    assert everyone.pixels_hash == "a1efb81a9fa30ee9"
    assert split.hashes == {
        "train_ids_hash": "85bfcb9302dc4ef3",
        "val_ids_hash": "dfaa4145932b2a17",
        "pixels_hash": "a1efb81a9fa30ee9",
        "labels_hash": "",
    }

    # An image is compared with its file.
    with zipfile.ZipFile(copy) as archive:
        original = Image.open(archive.open(people.ids[450]))
        assert_array_equal(people.images[450], np.asarray(original))


def test_ffhq_is_found_in_every_place_and_split_by_ids_by_its_name_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "DATA_FOLDER", tmp_path)
    place = tmp_path / "FFHQ"
    with refused(f"FFHQ was not found at {place} .*docs/ffhq.md"):
        load_images("FFHQ", 8)

    def check():
        # The second time, the packed file lies there too.
        for _ in range(2):
            image_set = load_images("FFHQ", 8)
            assert (image_set.name, image_set.rule) == ("FFHQ", "FFHQ")
            assert image_set.ids == list(range(10))
            assert_array_equal(image_set.images, IMAGES)

    # This is a link to the tree of FFHQ's own download.
    copy = write_folder(tmp_path / "copy", IMAGES, f"thumbnails128x128/{TREE}")
    place.symlink_to(copy)
    check()
    assert load_images(copy, 8).rule == "name"
    # Its folders of a thousand images are no labels.
    with refused("FFHQ has no label for thumbnails"):
        load_images("FFHQ", 8, labels=True)
    # A picture without a number, or a second one with the same number, would be trained on, too.
    for stray in ("teaser.png", "00003.png"):
        (copy / stray).touch()
        with refused("a number of its own"):
            load_images("FFHQ", 8)
        (copy / stray).unlink()
    place.unlink()
    # Here is a zip beside an empty folder.
    place.mkdir()
    write_zip(tmp_path / "FFHQ.zip")
    check()


def split_of(names, ids=None, rule="name", name="reference"):
    """Split a set of images with these names, or also these ids, whose pixels nobody reads."""
    names = [*names]
    return split_images(ImageSet("set", np.empty(0), ids or names, names, rule), name)


def held_out_of(names):
    """Return the names of the images that are held out."""
    return {names[i] for i in split_of(names).val_indices}


# Of FFHQ every 500th image is there.
FULL = range(0, 70_000, 500)


@pytest.mark.parametrize(
    "ids, rule, name, first_held_out, reason",
    [
        (FULL, "FFHQ", "reference", 63_000, "FFHQ's ids from 63,000 on"),
        (FULL, "FFHQ", "official", 60_000, "FFHQ's ids from 60,000 on"),
        # Parts of FFHQ.
        (FULL[:124], "FFHQ", "reference", 56_000, "last 10% by id"),
        (range(63_000, 63_020), "FFHQ", "reference", 63_018, "last 10% by id"),
        (range(2), "id", "reference", 1, "last 10% by id"),
    ],
)
def test_splits_by_id(ids, rule, name, first_held_out, reason):
    split = split_of(map(str, ids), ids, rule, name)

    ids = np.array(ids)
    assert_array_equal(ids[split.train_indices], ids[ids < first_held_out])
    assert_array_equal(ids[split.val_indices], ids[ids >= first_held_out])
    assert f"{split.rule}), such as {ids[ids >= first_held_out][0]}" in split.description
    assert reason in split.rule


def test_an_image_stays_on_its_side_whatever_is_added_or_missing():
    names = [f"{folder}/{folder}{i}.png" for folder in "abc" for i in range(100)]
    digests = {}
    more = [f"aa/{i}.png" for i in range(100)]
    for present in (names, more + names, names[::2], [f"elsewhere/{name}" for name in names]):
        for name in present:
            digests[name] = hashlib.sha256(name.rpartition("/")[2].encode()).hexdigest()
        # This is a tenth in hexadecimal.
        below = {name for name in present if digests[name] < "1999999a"}
        assert held_out_of(present) == below

    # One image at least is held out, and all the same names are on one side.
    trained = [name for name in names if digests[name] > "2"]
    assert held_out_of(trained) == {min(trained, key=digests.get)}
    with refused(r"0 images train, 9 validate .*: too few; folders"):
        split_of(f"{i}/face.png" for i in range(9))


def test_a_name_that_is_not_utf_8_has_a_side_and_is_shown():
    split = split_of(["\udcff.png", "a.png"])
    assert r"such as \udcff.png" in split.description
    # Models that were trained elsewhere have no hash of the ids.
    assert split.differences({}) == []


def load_parts(path, folders):
    """Load a zip with an image in each folder, the numbers rising."""
    files = {f"{folder}/{i}.png": PICTURE for i, folder in enumerate(folders.split())}
    return load_images(write_zip(path / "set.zip", [], more=files), 8)


@pytest.mark.parametrize(
    "folders, expected",
    [
        ("Validation/class Validation/other Train/class", "vvt"),
        ("train/val val/train test more/a", "tv--"),
        ("test valid train", "-vt"),
        # The zip of a folder has the folder itself.
        ("top/val top/train", "vt"),
    ],
)
def test_folders_say_what_is_held_out(tmp_path, folders, expected):
    image_set = load_parts(tmp_path, folders)
    split = split_images(image_set, "official")
    ids = np.array(image_set.ids)
    sides = np.full(len(expected), "-")
    sides[ids[split.train_indices]] = "t"
    sides[ids[split.val_indices]] = "v"
    assert "".join(sides) == expected
    others = expected.count("-")
    assert image_set.summary.endswith(f"; {others} other files" if others else "0 left out")


@pytest.mark.parametrize(
    "folders",
    ["train", "val test", "training testing", "train-1 val-1", "a/b/train a/b/val"],
)
def test_other_folders_are_classes(tmp_path, folders):
    image_set = load_parts(tmp_path, folders)
    assert len(image_set.images) == len(folders.split())
    assert image_set.rule == "name"
