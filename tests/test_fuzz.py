"""Spoilt configs, images, archives and checkpoints each give a clear error or the right result.

300 cases of all kinds:
    python -m pytest tests/test_fuzz.py
More cases and others, with their outcomes printed:
    python -m pytest tests/test_fuzz.py -s --fuzz-cases 5000 --fuzz-seed 1000
One case again, with its traceback:
    python -m pytest tests/test_fuzz.py -k zip_case --fuzz-cases 1 --fuzz-seed 1234

A case is a function of its kind and number; the numbers of each kind count up from the seed. An
error must be of a documented type, short and printable, and name the file or the field. A result
must be that of the original, or of the valid file which the spoiling made. The file must stay as
it was, with nothing new beside it. Limits of memory are tested in test_hostile_*.py.
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
from data.decode import decode, fit_square
from data.sources import is_image_name
from functions.noise_scheduler import NoiseScheduler
from functions.sampling.generation import rebuild
from functions.support import files
from functions.support.checkpoint import load_weights, verify_checkpoint
from functions.support.errors import UserError
from functions.support.run_folder import Facts, Run
from functions.training.recorder import Recorder
from models.unet import UNet
from tests import spoilt_files as spoilt
from tests.data import packing

# A case may take so many seconds of this process, and an error's message have so many characters.
SECONDS = 10
LONGEST_MESSAGE = 600
# Images are read at so many pixels.
SIZE = 8
# A case in a directory in memory is faster.
PARENT_FOLDER = "/dev/shm" if Path("/dev/shm").is_dir() else None

# What came of a case in which a file was read, in words.
SAME = "read as the original"
OTHER = "read as what the spoiling made"
IN_PART = "read in part, and it is said"

FIELDS = [*vars(EXPERIMENTS["faces"].diffusion), *vars(EXPERIMENTS["faces"].model)]
# A ConfigError names a field in one of these ways.
NAMED = [
    # The field has a wrong value.
    *(f": {field} is " for field in FIELDS),
    # The field, or the part of the config, is missing.
    *(f"'{name}'" for name in ("diffusion", "model", *FIELDS)),
    # The field is unknown; its name follows.
    "unexpected keyword argument '",
    # The part of the config is no dictionary of fields.
    "DiffusionConfig() argument after **",
    "ModelConfig() argument after **",
]

# Each function of a kind makes a spoilt file, and returns its path, a function that reads it, and
# one that judges what was read: it raises AssertionError, or says in words what came.


def config_case(folder, rng):
    """Spoil the config of an experiment."""
    path = folder / "config.json"
    given = rng.choice([*EXPERIMENTS.values()]).to_dict()
    for _ in range(rng.choice((1, 1, 2, 3))):
        spoilt.spoil_tree(given, rng)
    path.write_text(json.dumps(given))

    def judge(experiment):
        read = experiment.to_dict()
        for part in read:
            for name, value in read[part].items():
                assert given[part].get(name, value) == value
        assert Experiment.from_dict(read) == experiment

        # What was read can be used: its betas are finite, and its network can be built.
        config = experiment.diffusion
        scheduler = NoiseScheduler(
            config.timesteps_diff, config.beta_start, config.beta_end, config.rescale_betas
        )
        assert scheduler.alphas_cumprod.isfinite().all()
        with torch.device("meta"):
            UNet(**vars(experiment.model))
        return OTHER

    return path, lambda: Experiment.from_dict(json.loads(path.read_text())), judge


@functools.cache
def pictures():
    """Return files of the formats that data sets have, and their pixels, both by name."""
    names = ["RGB.png", "P.png", "LA.png", "L.png", "RGB.jpeg", "CMYK.jpeg"]
    names += ["RGB.webp", "RGBA.webp", "P.bmp"]
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    picture = Image.fromarray(pixels)

    encoded = {}
    for name in names:
        mode, file_format = name.split(".")
        encoded[name] = packing.encoded(picture.convert(mode), file_format)
    return encoded, {name: fit_square(decode(data), SIZE) for name, data in encoded.items()}


def data_set_case(path, truths, rng, checksums=True):
    """Read a data set whose images are `truths`, or without any what NumPy reads.

    A zip must give the images that it still names. Without checksums one image may differ.
    """
    data_set = path.parent if path.parent.name == "set" else path
    may_be_bad = rng.choice((0, 9))

    def judge(result):
        expected = truths or [fit_square(image, SIZE) for image in np.load(path)["a"]]
        odd = 0
        for image in result.images:
            if not any(np.array_equal(image, truth) for truth in expected):
                odd += 1
        assert odd <= (not checksums), "other pixels than any original's"

        named = expected
        if path.suffix == ".zip":
            named = set(filter(is_image_name, zipfile.ZipFile(path).namelist()))
        count = len(result.images) + len(result.bad_images)
        assert count == len(named), "an image is missing, and nothing says so"

        if odd:
            return "read with other pixels, without checksums"
        return IN_PART if result.bad_images else SAME

    return path, lambda: load_images(str(data_set), SIZE, may_be_bad), judge


def image_case(folder, rng):
    """Spoil one of two images in a folder."""
    encoded, pixels = pictures()
    path = folder / "set" / "spoilt.png"
    name = rng.choice([*encoded])
    data = spoilt.spoil_bytes(encoded[name], rng)

    path.parent.mkdir()
    path.write_bytes(data)
    path.with_name("good.png").write_bytes(encoded["RGB.png"])
    # Of these formats only PNG has checksums.
    checksums = data.startswith(b"\x89PNG")
    return data_set_case(path, [pixels["RGB.png"], pixels[name]], rng, checksums)


def zip_case(folder, rng):
    """Spoil an archive of four images."""
    encoded, pixels = pictures()
    path = folder / "set.zip"
    names = ("RGB.png", "P.png", "LA.png", "L.png")
    members = {f"{i:05d}.png": encoded[name] for i, name in enumerate(names)}
    path.write_bytes(spoilt.spoilt_zip(members, rng))
    return data_set_case(path, [pixels[name] for name in names], rng)


def npz_case(folder, rng):
    """Spoil an archive of an array of six images, or put a spoilt array into a sound archive."""
    path = folder / "set.npz"
    images = np.random.default_rng(0).integers(0, 256, (6, SIZE, SIZE, 3), np.uint8)
    buffer = io.BytesIO()
    np.save(buffer, images)
    array = buffer.getvalue()

    if rng.random() < 0.6:
        path.write_bytes(spoilt.spoilt_zip({"a.npy": array, "readme": b"images"}, rng))
        return data_set_case(path, [*images], rng)

    # A spoilt array without a checksum may be valid; then NumPy says what it holds.
    path.write_bytes(spoilt.zipped({"a.npy": spoilt.spoil_bytes(array, rng)}))
    return data_set_case(path, [], rng)


@functools.cache
def whole_checkpoint():
    """Return the bytes of a sound checkpoint, and a dictionary of all that it holds."""
    tensors, contents = spoilt.checkpoint_parts()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "whole"
        files.write_tensors(path, tensors, contents)
        return path.read_bytes(), {**tensors, **contents}


def checkpoint_case(folder, rng):
    """Spoil a checkpoint, which is read to be sampled from or to be resumed."""
    path = folder / "a.safetensors"
    how = rng.random()
    resumed = rng.random() < 0.5
    whole, truth = whole_checkpoint()

    if how < 0.4:
        # Either any byte may be spoilt, or those of the tensors' numbers alone.
        start = rng.choice((0, 8 + len(spoilt.header_of(whole))))
        path.write_bytes(whole[:start] + spoilt.spoil_bytes(whole[start:], rng))
    elif how < 0.6:
        tree = json.loads(spoilt.header_of(whole))
        spoilt.spoil_tree(tree, rng)
        path.write_bytes(spoilt.with_header(whole, tree))
    else:
        # The file has the right checksum for the spoilt contents, so it is read as they say.
        contents = json.loads(spoilt.contents_text(whole))
        spoilt.spoil_tree(contents, rng)
        path.write_bytes(spoilt.with_contents(whole, contents))
        truth = {**truth, **contents}

    def judge(result):
        assert spoilt.same(result, {name: truth[name] for name in result}), "other values"
        return SAME if how < 0.6 else OTHER

    return path, lambda: read_checkpoint(path, resumed), judge


def read_checkpoint(path, resumed):
    """Read a checkpoint as training or as sampling does; return what was read, by name."""
    if not resumed:
        saved = load_weights(path)
        weights = rebuild(saved, spoilt.CPU).network.state_dict()
        weights = {f"ema.{name}": tensor for name, tensor in weights.items()}
        return {"config": saved.config, "run": saved.provenance, **weights}

    file = verify_checkpoint(path)
    state = spoilt.training_state()
    run = Run("faces", Experiment.from_dict(file.contents["config"]), path.parent, checkpoint=file)
    state.load(file)
    images = SimpleNamespace(device=spoilt.CPU)
    # It loads its own numbers when it is made.
    Recorder(run, Facts.of(file), state, None, images, None, None)
    return {**file.contents, **state.tensors()}


def run_case(kind, number):
    """Return in words what came of a case; raise an exception when it must not come."""
    rng = random.Random(f"{kind.__name__} {number}")
    with tempfile.TemporaryDirectory(dir=PARENT_FOLDER) as folder:
        path, read, judge = kind(Path(folder), rng)
        before = files_in(folder)
        start = time.process_time()
        error = None
        try:
            # Reading a data set prints that it was prepared.
            with contextlib.redirect_stdout(None):
                result = read()
        except (UserError, ConfigError) as caught:
            error = caught
        assert time.process_time() - start < SECONDS, "too slow"
        assert files_in(folder) == before, "the file was changed, or another lies beside it"

        if error is None:
            return judge(result)
        message = str(error)
        shown = repr(message[:200])
        names = NAMED if isinstance(error, ConfigError) else [path.name]
        assert any(name in message for name in names), f"neither file nor field is named: {shown}"
        assert len(message) < LONGEST_MESSAGE, f"no short sentence: {shown}"
        assert message.isprintable(), f"no short sentence: {shown}"
        return f"refused: {type(error).__name__}"


def files_in(folder):
    """Return the paths in a folder, each with a number that tells what a file there holds."""
    hashes = {}
    for path in Path(folder).rglob("*"):
        # Packed files may appear, as the data set is prepared once for all later runs.
        if not re.search(r"\.packed(\.\w+)?$", path.name):
            hashes[path] = hash(path.read_bytes()) if path.is_file() else None
    return hashes


@pytest.mark.parametrize("kind", [config_case, image_case, zip_case, npz_case, checkpoint_case])
def test_spoilt_files_give_a_clear_error_or_the_right_result(kind, request):
    first = request.config.getoption("--fuzz-seed")
    # Each of the 5 kinds has a fifth of the cases, rounded up.
    count = -(-request.config.getoption("--fuzz-cases") // 5)
    outcomes = Counter()
    for number in range(first, first + count):
        try:
            outcomes[run_case(kind, number)] += 1
        except Exception as error:
            message = f"again: -k {kind.__name__} --fuzz-cases 1 --fuzz-seed {number}"
            raise AssertionError(message) from error
    print(f"\n{kind.__name__}, {count:,} cases:", dict(outcomes))


@pytest.mark.parametrize(
    ("read", "error", "message"),
    [
        # A reader must not fail with an undocumented error, nor with one that names no file.
        (lambda path: {}["format"], KeyError, "format"),
        (lambda path: load_images("other", SIZE), AssertionError, "neither file nor field"),
        # It must neither change the file, nor write another.
        (lambda path: path.write_bytes(b"harmed"), AssertionError, "was changed"),
        (lambda path: path.with_name("left").touch(), AssertionError, "lies beside it"),
    ],
)
def test_it_notices_what_must_not_come(read, error, message):
    def kind(folder, rng):
        (folder / "file").write_bytes(b"whole")
        return folder / "file", lambda: read(folder / "file"), lambda result: SAME

    with pytest.raises(error, match=message):
        run_case(kind, 0)


@pytest.mark.slow
def test_it_notices_a_reader_without_checksums(monkeypatch):
    # The sound checkpoint is written and cached here, before checksums lose their meaning.
    whole_checkpoint()
    monkeypatch.setattr(files, "checksum", lambda tensor: ANY)

    with pytest.raises(AssertionError, match="other values"):
        for number in range(60):
            run_case(checkpoint_case, number)
