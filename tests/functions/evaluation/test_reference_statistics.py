"""Files of reference statistics: published, checked; damaged and hostile ones are one sentence."""

import io
import json
import math
import re
import zipfile
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch_fidelity", reason="requirements-eval.txt is not installed")

from data.datasets import ImageSet, hash_ids
from functions.evaluation.features import Reference
from functions.evaluation.reference_statistics import (
    FORMAT,
    describe,
    read_reference,
    write_reference,
)
from functions.support.errors import UserError
from tests.functions.evaluation.parts import Harm, small_extractor

EXTRACTOR = small_extractor()
FACTS = dict(
    dataset="d",
    split="train",
    count=5,
    image_size=16,
    ids_hash="a",
    pixels_hash="b",
    **EXTRACTOR.facts,
)
GOOD = {"mu": np.zeros(8), "sigma": np.eye(8)}


def description(**changes):
    """Return a sound description but for these changes, as a file has it."""
    return np.array(json.dumps({"format": FORMAT, **FACTS, **changes}))


def arrays(**changes):
    """Return the arrays of a sound file but for these changes."""
    return {"description": description(), **GOOD, **changes}


@pytest.mark.parametrize("name", ["discs\udcff", "d" * 250])
def test_a_reference_with_an_odd_name_can_be_read(name, tmp_path):
    image_set = ImageSet(name, np.zeros((4, 16, 16, 3), np.uint8), [*range(4)])
    facts = describe(image_set, np.arange(4), "train", EXTRACTOR)
    write_reference(tmp_path / "odd.npz", Reference(facts, GOOD))
    assert read_reference(tmp_path / "odd.npz", 16, EXTRACTOR).description == facts


def test_reference_is_published_and_checked(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    indices = np.arange(5, 15)
    image_set = ImageSet("private/discs", images, [*range(100, 120)])
    facts = describe(image_set, indices, "train", EXTRACTOR)
    assert facts["dataset"] == "discs"
    assert facts["ids_hash"] == hash_ids([*range(105, 115)])

    # Other pixels under the same ids are another reference.
    images[7, 0, 0, 0] ^= 1
    assert describe(image_set, indices, "train", EXTRACTOR) != facts

    public = tmp_path / "discs.npz"
    write_reference(public, Reference(facts, GOOD))
    reference = read_reference(public, 16, EXTRACTOR)
    assert reference.features is None
    assert reference.description == facts

    other_weights = replace(EXTRACTOR, facts={**EXTRACTOR.facts, "weights_hash": "x"})
    other_width = replace(EXTRACTOR, width=2048)
    for size, extractor, message in (
        (32, EXTRACTOR, "image_size = 16; here it is 32"),
        (16, other_weights, "weights_hash = none; here it is x"),
        (16, other_width, "features = 8; here it is 2048"),
    ):
        with pytest.raises(UserError, match=message):
            read_reference(public, size, extractor)


def test_files_have_the_format_that_was_published(tmp_path):
    """A file written member by member, as it was published, is the one that is written now.

    So old files stay valid, and those of now are valid elsewhere.
    """
    old = tmp_path / "old.npz"
    new = tmp_path / "new.npz"
    np.savez(old, **arrays())

    write_reference(new, read_reference(old, 16, EXTRACTOR))
    assert old.read_bytes() == new.read_bytes()


def with_a_huge_shape(archive):
    """Claim in the archive's headers that sigma is an array of 512 TB."""
    # The new shape is as long as the old one with the spaces behind it, so the header keeps its
    # length.
    shape = b"(8, 8), }" + 12 * b" "
    larger = b"(8" + 12 * b"0" + b", 8), }"
    huge = io.BytesIO()
    with zipfile.ZipFile(archive) as members, zipfile.ZipFile(huge, "w") as changed:
        for name in members.namelist():
            changed.writestr(name, members.read(name).replace(shape, larger))
    return huge.getvalue()


def with_a_wrong_method(archive):
    """Claim in the archive's headers that the arrays, which are plain, are compressed."""
    plain = archive.getvalue()
    changed = bytearray(plain)
    # In a local header the method is at byte 8, in the central directory at byte 10.
    for signature, method in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        for header in re.finditer(signature, plain):
            changed[header.start() + method] = zipfile.ZIP_DEFLATED
    return bytes(changed)


def bad_files(harmed):
    """Return arrays, or the bytes of a whole file, by what is wrong with them.

    One of them, when it is unpickled, makes the file `harmed`.
    """
    plain = io.BytesIO()
    np.savez(plain, **arrays())
    # Zeros unpack to far more than the file itself.
    bomb = io.BytesIO()
    np.savez_compressed(bomb, **arrays(mu=np.zeros(200), sigma=np.zeros((200, 200))))
    return {
        "empty": b"",
        "text": b"mu",
        "empty set": arrays(description=description(count=0)),
        "a count that is none": arrays(description=description(count="5")),
        "nan": arrays(mu=np.full(8, math.nan)),
        "code": arrays(mu=np.array([Harm(harmed)], dtype=object)),
        "other arrays": arrays(sigma=np.eye(7)),
        "other types": arrays(mu=np.zeros(8, np.float32)),
        "a number": arrays(mu=np.array(1.0)),
        "no mu": {"description": description(), "sigma": np.eye(8)},
        "no description": GOOD,
        "another format": arrays(description=description(format="another")),
        "a list": arrays(description=np.array("[]")),
        "no JSON": arrays(description=np.array("{")),
        "deep JSON": arrays(description=np.array("[" * 100_000)),
        # On a terminal these would clear the screen.
        "control characters": arrays(description=description(dataset="\x1b[2J")),
        "a bomb": bomb.getvalue(),
        "a huge shape": with_a_huge_shape(plain),
        "a wrong method": with_a_wrong_method(plain),
        "cut off": plain.getvalue()[:-30],
    }


@pytest.mark.parametrize("kind", bad_files(None))
def test_bad_files_are_one_sentence(kind, tmp_path):
    path = tmp_path / "bad.npz"
    harmed = tmp_path / "ran"
    content = bad_files(harmed)[kind]
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, **content)

    with pytest.raises(UserError, match=r"bad\.npz: no valid reference statistics") as error:
        read_reference(path, 16, EXTRACTOR)
    sentence = str(error.value)
    assert sentence.isprintable()
    assert len(sentence) < 600
    assert not harmed.exists()
