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
    return np.array(json.dumps({"format": FORMAT, **FACTS, **changes}))


def test_reference_is_published_and_checked(tmp_path):
    images, indices = (
        np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8),
        np.arange(5, 15),
    )
    facts = describe(images, indices, "abc", "discs", "train", EXTRACTOR)
    images[7, 0, 0, 0] ^= 1  # other pixels under the same ids
    assert describe(images, indices, "abc", "discs", "train", EXTRACTOR) != facts

    public = tmp_path / "discs.npz"
    write_reference(public, Reference(facts, GOOD))
    found = read_reference(public, 16, EXTRACTOR)
    assert found.features is None and found.description == facts
    for size, extractor, message in (
        (32, EXTRACTOR, "image_size = 16; here it is 32"),
        (
            16,
            replace(EXTRACTOR, facts={**EXTRACTOR.facts, "weights_hash": "x"}),
            "weights_hash = none; here it is x",
        ),
        (16, replace(EXTRACTOR, width=2048), "features = 8; here it is 2048"),
    ):
        with pytest.raises(UserError, match=message):
            read_reference(public, size, extractor)


def test_files_have_the_format_that_was_published(tmp_path):
    """Member by member: files of before stay valid, and those of now are valid elsewhere."""
    old, new = tmp_path / "old.npz", tmp_path / "new.npz"
    np.savez(old, description=description(), **GOOD)
    write_reference(new, read_reference(old, 16, EXTRACTOR))
    assert old.read_bytes() == new.read_bytes()


def bad_files(ran):
    """Arrays, or the bytes of a whole file, by what is wrong with them."""
    packed, plain, huge = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.savez_compressed(
        packed, description=description(), mu=np.zeros(200), sigma=np.zeros((200, 200))
    )
    np.savez(plain, description=description(), **GOOD)
    with zipfile.ZipFile(plain) as archive, zipfile.ZipFile(huge, "w") as other:
        for name in archive.namelist():  # a header of the same length, of 512 TB
            shape, larger = b"(8, 8), }" + 12 * b" ", b"(8" + 12 * b"0" + b", 8), }"
            other.writestr(name, archive.read(name).replace(shape, larger))
    wrong = bytearray(plain.getvalue())  # as if the arrays, which are plain, were compressed
    for signature, method in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        for found in re.finditer(signature, plain.getvalue()):
            wrong[found.start() + method] = zipfile.ZIP_DEFLATED
    good = {"description": description(), **GOOD}
    return {
        "empty": b"",
        "text": b"mu",
        "empty set": {**good, "description": description(count=0)},
        "a count that is none": {**good, "description": description(count="5")},
        "nan": {**good, "mu": np.full(8, math.nan)},
        "code": {**good, "mu": np.array([Harm(ran)], dtype=object)},
        "other arrays": {**good, "sigma": np.eye(7)},
        "other types": {**good, "mu": np.zeros(8, np.float32)},
        "a number": {**good, "mu": np.array(1.0)},
        "no mu": {"description": description(), "sigma": np.eye(8)},
        "no description": GOOD,
        "another format": {**good, "description": description(format="another")},
        "a list": {**good, "description": np.array("[]")},
        "no JSON": {**good, "description": np.array("{")},
        "deep JSON": {**good, "description": np.array("[" * 100_000)},
        "control characters": {**good, "description": description(dataset="\x1b[2J")},
        "a bomb": packed.getvalue(),
        "a huge shape": huge.getvalue(),
        "a wrong method": bytes(wrong),
        "cut off": plain.getvalue()[:-30],
    }


@pytest.mark.parametrize("kind", bad_files(None))
def test_bad_files_are_one_sentence(kind, tmp_path):
    path, ran = tmp_path / "bad.npz", tmp_path / "ran"
    content = bad_files(ran)[kind]
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, **content)
    with pytest.raises(UserError, match=r"bad\.npz: no sound reference statistics") as error:
        read_reference(path, 16, EXTRACTOR)
    assert str(error.value).isprintable() and len(str(error.value)) < 600 and not ran.exists()
