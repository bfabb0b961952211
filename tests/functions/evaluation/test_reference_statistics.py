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

from functions.evaluation.features import Reference, real_features, statistics
from functions.evaluation.reference_statistics import (
    FORMAT,
    describe,
    read_reference,
    write_reference,
)
from functions.support.errors import UserError
from functions.support.processes import SINGLE_PROCESS
from tests.functions.evaluation.small_extractor import small_extractor

EXTRACTOR = small_extractor()
FACTS = {
    "format": FORMAT,
    "dataset": "d",
    "split": "train",
    "count": 5,
    "image_size": 16,
    "ids_hash": "a",
    "pixels_hash": "b",
    "extractor": "small",
    "weights_hash": "none",
}
GOOD = {"mu": np.zeros(8), "sigma": np.eye(8)}


def test_reference_is_published_and_checked(tmp_path):
    images, indices = np.random.default_rng(0).integers(0, 256, (100, 16, 16, 3), dtype=np.uint8), np.arange(10, 60)
    description = describe(images, indices, "abc", "discs", "train", EXTRACTOR)
    changed = images.copy()
    changed[20, 0, 0, 0] ^= 1  # other pixels under the same ids
    assert describe(changed, indices, "abc", "discs", "train", EXTRACTOR) != description
    real = real_features(images, indices, 64, EXTRACTOR, SINGLE_PROCESS)
    first = Reference(description, statistics(real), real)
    np.testing.assert_allclose(first.statistics["sigma"], np.cov(real.double().T), rtol=1e-9, atol=1e-12)

    public = tmp_path / "discs.npz"
    write_reference(public, first)
    found = read_reference(public, 16, EXTRACTOR)
    assert found.features is None and found.description == description
    with pytest.raises(UserError, match="image_size = 16; here it is 32"):
        read_reference(public, 32, EXTRACTOR)
    with pytest.raises(UserError, match="weights_hash = none; here it is other"):
        read_reference(public, 16, replace(EXTRACTOR, facts={**EXTRACTOR.facts, "weights_hash": "other"}))
    with pytest.raises(UserError, match="features = 8; here it is 2048"):
        read_reference(public, 16, replace(EXTRACTOR, width=2048))


def test_files_have_the_format_that_was_published(tmp_path):
    """Member by member: files of before stay valid, and those of now are valid elsewhere."""
    old, new = tmp_path / "old.npz", tmp_path / "new.npz"
    np.savez(old, description=np.array(json.dumps(FACTS)), **GOOD)
    write_reference(new, read_reference(old, 16, EXTRACTOR))
    assert old.read_bytes() == new.read_bytes()


def bad_files(ran):
    """Arrays, or the bytes of a whole file, by what is wrong with them."""

    class Harm:
        """Unpickled, it makes a file."""

        def __reduce__(self):
            return open, (str(ran), "w")

    description = lambda **changes: np.array(json.dumps({**FACTS, **changes}))
    text = description()
    packed, plain, huge = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.savez_compressed(packed, description=text, mu=np.zeros(200), sigma=np.zeros((200, 200)))
    np.savez(plain, description=text, **GOOD)
    with zipfile.ZipFile(plain) as archive, zipfile.ZipFile(huge, "w") as other:
        for name in archive.namelist():  # a header of the same length, of 512 TB
            shape, larger = b"(8, 8), }" + 12 * b" ", b"(8" + 12 * b"0" + b", 8), }"
            other.writestr(name, archive.read(name).replace(shape, larger))
    wrong = bytearray(plain.getvalue())  # as if the arrays, which are plain, were compressed
    for signature, method in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        for found in re.finditer(signature, plain.getvalue()):
            wrong[found.start() + method] = zipfile.ZIP_DEFLATED
    return {
        "empty": b"",
        "text": b"mu",
        "empty set": {"description": description(count=0), **GOOD},
        "a count that is none": {"description": description(count="5"), **GOOD},
        "nan": {"description": text, **GOOD, "mu": np.full(8, math.nan)},
        "code": {"description": text, **GOOD, "mu": np.array([Harm()], dtype=object)},
        "other arrays": {"description": text, **GOOD, "sigma": np.eye(7)},
        "other types": {"description": text, **GOOD, "mu": np.zeros(8, np.float32)},
        "a number": {"description": text, **GOOD, "mu": np.array(1.0)},
        "no mu": {"description": text, "sigma": np.eye(8)},
        "no description": GOOD,
        "another format": {"description": description(format="another"), **GOOD},
        "a list": {"description": np.array("[]"), **GOOD},
        "no JSON": {"description": np.array("{"), **GOOD},
        "deep JSON": {"description": np.array("[" * 100_000), **GOOD},
        "control characters": {"description": description(dataset="\x1b[2J"), **GOOD},
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


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"none\.npz: no sound.*No such file"):
        read_reference(tmp_path / "none.npz", 16, EXTRACTOR)
