"""Configs, images, archives and checkpoints, spoilt by the hundred: each gives a clear error or the right result.

    python -m pytest tests/test_fuzz.py                                               300 cases, of all kinds
    python -m pytest tests/test_fuzz.py -s --fuzz-cases 5000 --fuzz-seed 1000         more and others, and what came
    python -m pytest tests/test_fuzz.py -k zip_case --fuzz-cases 1 --fuzz-seed 1234   one again, with its traceback

A case is a function of its kind and number; the numbers of each kind count up from the seed. An error must be of a
documented type, short and printable, and name the file or the field; a result must be the original's, or that of the
valid file which the spoiling made. The file stays as it was, with nothing new beside it. Memory: test_hostile_*.py.
"""

import contextlib
import functools
import io
import json
import random
import re
import tempfile
import time
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from PIL import Image

from config import EXPERIMENTS, ConfigError, Experiment
from data.datasets import load_images
from data.decode import decode_rgb, fit_square
from data.sources import is_image_name
from functions.noise_scheduler import NoiseScheduler
from functions.sampling.generation import rebuild
from functions.support import files
from functions.support.checkpoint import check_whole, load_weights
from functions.support.errors import UserError
from functions.support.run_folder import Run
from functions.training.book_keeping import BookKeeper
from models.unet import UNet
from tests import spoilt_files as spoilt
from tests.data import packing

SECONDS, LONGEST_MESSAGE, SIZE = 10, 600, 8
SAME, OTHER, IN_PART = (
    "read as the original",
    "read as what the spoiling made",
    "read in part, and it is said",
)
FIELDS = [*vars(EXPERIMENTS["faces"].diffusion), *vars(EXPERIMENTS["faces"].model)]
# How a ConfigError names a field: of a wrong value, missing, unknown (it follows, quoted), or of a part that is none
NAMED = [
    *(f": {field} is " for field in FIELDS),
    *(f"'{name}'" for name in ("diffusion", "model", *FIELDS)),
]
NAMED += [
    "unexpected keyword argument '",
    "DiffusionConfig() argument after **",
    "ModelConfig() argument after **",
]


def config_case(folder, rng):
    """Make a spoilt file; return its path, a function that reads it, and one that judges what was read."""
    path, given = folder / "config.json", rng.choice([*EXPERIMENTS.values()]).to_dict()
    for _ in range(rng.choice((1, 1, 2, 3))):
        spoilt.spoil_tree(given, rng)
    path.write_text(json.dumps(given))

    def judge(experiment):
        got = experiment.to_dict()
        assert all(
            given[part].get(name, value) == value
            for part in got
            for name, value in got[part].items()
        )
        assert Experiment.from_dict(got) == experiment
        schedule = (
            got["diffusion"][name]
            for name in ("timesteps_diff", "beta_start", "beta_end", "rescale_betas")
        )
        assert NoiseScheduler(*schedule).alphas_cumprod.isfinite().all()
        with torch.device("meta"):
            UNet(**vars(experiment.model))
        return OTHER

    return path, lambda: Experiment.from_dict(json.loads(path.read_text())), judge


@functools.cache
def pictures():
    """Files of the forms that data sets have, and their pixels."""
    picture, encoded = (
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)),
        {},
    )
    for name in (
        "RGB.png",
        "P.png",
        "LA.png",
        "L.png",
        "RGB.jpeg",
        "CMYK.jpeg",
        "RGB.webp",
        "RGBA.webp",
        "P.bmp",
    ):
        mode, form = name.split(".")
        encoded[name] = packing.encoded(picture.convert(mode), form)
    return encoded, {name: fit_square(decode_rgb(data), SIZE) for name, data in encoded.items()}


def data_set_case(path, truths, rng, checksums=True):
    """All of `truths` are read, or what NumPy reads, or what a zip still names; one may differ without checksums."""
    data_set, may_be_bad = path.parent if path.parent.name == "set" else path, rng.choice((0, 9))

    def judge(result):
        expected = truths or [fit_square(image, SIZE) for image in np.load(path)["a"]]
        odd = sum(
            not any(np.array_equal(image, one) for one in expected) for image in result.images
        )
        assert odd <= (not checksums), "other pixels than any original's"
        named = (
            {*filter(is_image_name, zipfile.ZipFile(path).namelist())}
            if path.suffix == ".zip"
            else expected
        )
        assert len(result) + len(result.bad_images) == len(named), (
            "an image is missing, and nothing says so"
        )
        return (
            "read with other pixels, without checksums"
            if odd
            else IN_PART
            if result.bad_images
            else SAME
        )

    return path, lambda: load_images(str(data_set), SIZE, may_be_bad), judge


def image_case(folder, rng):
    """A folder with a good image and a spoilt one."""
    (encoded, pixels), path = pictures(), folder / "set" / "spoilt.png"
    name, good = rng.choice([*encoded]), "RGB.png"
    data = spoilt.spoil_bytes(encoded[name], rng)
    path.parent.mkdir()
    path.write_bytes(data)
    path.with_name("good.png").write_bytes(encoded[good])
    return data_set_case(path, [pixels[good], pixels[name]], rng, data.startswith(b"\x89PNG"))


def zip_case(folder, rng):
    """An archive of four images."""
    (encoded, pixels), path = pictures(), folder / "set.zip"
    names = {f"{i:05d}.png": name for i, name in enumerate(("RGB.png", "P.png", "LA.png", "L.png"))}
    path.write_bytes(
        spoilt.spoilt_zip({member: encoded[name] for member, name in names.items()}, rng)
    )
    return data_set_case(path, [pixels[name] for name in names.values()], rng)


def npz_case(folder, rng):
    """Six images, in a spoilt archive or in a whole one of a spoilt array, which must be what NumPy reads."""
    path, images = (
        folder / "set.npz",
        np.random.default_rng(0).integers(0, 256, (6, SIZE, SIZE, 3), np.uint8),
    )
    buffer = io.BytesIO()
    np.save(buffer, images)
    if rng.random() < 0.6:
        path.write_bytes(spoilt.spoilt_zip({"a.npy": buffer.getvalue(), "readme": b"images"}, rng))
        return data_set_case(path, [*images], rng)
    path.write_bytes(spoilt.zipped({"a.npy": spoilt.spoil_bytes(buffer.getvalue(), rng)}))
    return data_set_case(path, [], rng)


@functools.cache
def whole_checkpoint():
    tensors, contents = spoilt.checkpoint_parts()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "whole"
        files.write_tensors(path, tensors, contents)
        return path.read_bytes(), {**tensors, **contents}


def checkpoint_case(folder, rng):
    """A checkpoint, read to be sampled from or to be resumed."""
    path, how, resumed, (whole, truth) = (
        folder / "a.safetensors",
        rng.random(),
        rng.random() < 0.5,
        whole_checkpoint(),
    )
    if how < 0.4:  # the numbers alone, or anything
        start = rng.choice((0, 8 + len(spoilt.header_of(whole))))
        path.write_bytes(whole[:start] + spoilt.spoil_bytes(whole[start:], rng))
    elif how < 0.6:
        tree = json.loads(spoilt.header_of(whole))
        spoilt.spoil_tree(tree, rng)
        path.write_bytes(spoilt.with_header(whole, tree))
    else:  # with the right checksum
        contents = json.loads(spoilt.contents_text(whole))
        spoilt.spoil_tree(contents, rng)
        path.write_bytes(spoilt.with_contents(whole, contents))
        truth = {**truth, **contents}

    def judge(result):
        assert spoilt.same(result, {name: truth[name] for name in result}), "other values"
        return SAME if how < 0.6 else OTHER

    return path, lambda: read_checkpoint(path, resumed), judge


def read_checkpoint(path, resumed):
    if not resumed:
        saved = load_weights(path)
        weights = rebuild(UNet, saved, spoilt.CPU).network.state_dict()
        return {
            "config": saved.config,
            "run": saved.run,
            **{f"ema.{name}": t for name, t in weights.items()},
        }
    file, state = check_whole(path), spoilt.training_state()
    run = Run("faces", Experiment.from_dict(file.contents["config"]), path.parent, checkpoint=file)
    state.load(file)
    images = SimpleNamespace(device=spoilt.CPU)
    BookKeeper(run, state, None, images, None, None).load(run.remembered)
    return {**file.contents, **state.tensors()}


def run_case(kind, number):
    """What came of a case, in words; an exception when it is what must not come."""
    with tempfile.TemporaryDirectory(
        dir="/dev/shm" if Path("/dev/shm").is_dir() else None
    ) as folder:
        path, read, judge = kind(Path(folder), random.Random(f"{kind.__name__} {number}"))
        before, start = files_in(folder), time.process_time()
        try:
            with contextlib.redirect_stdout(None):  # what is said of a data set that was prepared
                result, error = read(), None
        except (UserError, ConfigError) as caught:
            result, error = None, caught
        assert time.process_time() - start < SECONDS, "too slow"
        assert files_in(folder) == before, "the file was changed, or another lies beside it"
        if error is None:
            return judge(result)
        message, names = str(error), NAMED if isinstance(error, ConfigError) else [path.name]
        assert any(name in message for name in names), (
            f"neither file nor field is named: {message[:200]!r}"
        )
        assert len(message) < LONGEST_MESSAGE and message.isprintable(), (
            f"no short sentence: {message[:200]!r}"
        )
        return f"refused: {type(error).__name__}"


def files_in(folder):
    """All but packed files, and a number that tells what they hold."""
    found = [
        path for path in Path(folder).rglob("*") if not re.search(r"\.packed(\.\w+)?$", path.name)
    ]
    return {path: path.is_file() and hash(path.read_bytes()) for path in found}


@pytest.mark.parametrize("kind", [config_case, image_case, zip_case, npz_case, checkpoint_case])
def test_spoilt_files_give_a_clear_error_or_the_right_result(kind, request):
    first, count = (
        request.config.getoption("--fuzz-seed"),
        -(-request.config.getoption("--fuzz-cases") // 5),
    )
    outcomes = Counter()
    for number in range(first, first + count):
        try:
            outcomes[run_case(kind, number)] += 1
        except Exception as error:
            raise AssertionError(
                f"again: -k {kind.__name__} --fuzz-cases 1 --fuzz-seed {number}"
            ) from error
    print(f"\n{kind.__name__}, {count:,} cases:", dict(outcomes))


@pytest.mark.parametrize(
    ("read", "error", "found"),
    [
        (lambda path: {}["format"], KeyError, "format"),
        (lambda path: load_images("other", SIZE), AssertionError, "neither file nor field"),
        (lambda path: path.write_bytes(b"harmed"), AssertionError, "was changed"),
        (lambda path: path.with_name("left").touch(), AssertionError, "lies beside it"),
    ],
)
def test_it_notices_what_must_not_come(read, error, found):
    def kind(folder, rng):
        (folder / "file").write_bytes(b"whole")
        return folder / "file", lambda: read(folder / "file"), lambda result: SAME

    with pytest.raises(error, match=found):
        run_case(kind, 0)


@pytest.mark.slow
def test_it_notices_a_reader_without_checksums(monkeypatch):
    whole_checkpoint()
    monkeypatch.setattr(files, "checksum", lambda tensor: ANY)
    with pytest.raises(AssertionError, match="other values"):
        for number in range(60):
            run_case(checkpoint_case, number)
