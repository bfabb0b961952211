"""Checkpoints that are damaged, or made to do harm: each is refused in a sentence that names it, at little cost."""

import functools
import json
import math
import os
import time

import pytest
import torch
from safetensors.torch import save_file

from functions.sampling.generation import rebuild
from functions.support import files
from functions.support.checkpoint import check_whole, load_weights
from functions.support.errors import CheckpointError, UserError
from functions.support.files import LONGEST_HEADER, write_tensors
from models.unet import UNet
from tests import spoilt_files
from tests.conftest import posix
from tests.peak_memory import at_most
from tests.spoilt_files import (
    checkpoint_parts,
    contents_text,
    header_of,
    same,
    snapshot,
    with_contents,
    with_header,
)

WEIGHT = "ema.conv_in.weight"
PARTS = ("config", "run", "scaler")


@pytest.fixture
def whole(path):
    write_tensors(path, *checkpoint_parts())
    return path.read_bytes()


def refusal(path, read=check_whole):
    """What is said of a file, when it is refused as it should be: in one line with its name, soon, in little memory."""
    start = time.process_time()
    with at_most(400), pytest.raises(CheckpointError) as caught:
        read(path)
    message = str(caught.value)
    assert time.process_time() - start < 10  # seconds
    assert (
        message.startswith(f"{path}: ")
        and message.isprintable()
        and len(message) < len(str(path)) + 400
    )
    return message.removeprefix(f"{path}: ")


def resume(path):
    """A training that takes a checkpoint over; what is refused must have changed nothing."""
    state = spoilt_files.stepped_state(1)
    before = snapshot(state)
    try:
        state.load(check_whole(path))
    except UserError:
        assert same(snapshot(state), before)
        raise


def sample(path):
    return rebuild(UNet, load_weights(path), torch.device("cpu"))


def test_truncated_files(path, whole):
    header = 8 + len(header_of(whole))
    places = {
        *range(0, 20),
        *range(header - 3, header + 20),
        *range(0, len(whole), 997),
        len(whole) - 1,
    }
    for end in sorted(places):
        path.write_bytes(whole[:end])
        assert "truncated" in refusal(path) or not path.stat().st_size


def test_a_flipped_bit_anywhere(path, whole):
    """In the length, the header, the contents, the checksums, the numbers."""
    places = {*range(0, 20), *range(20, len(whole), 1499), whole.index(b"exp_avg"), len(whole) - 1}
    for place in sorted(places):
        spoilt = bytearray(whole)
        spoilt[place] ^= 1 << place % 8
        path.write_bytes(spoilt)
        refusal(path)
    weight, spoilt = checkpoint_parts()[0]["model.conv_in.weight"], bytearray(whole)
    spoilt[whole.index(weight.contiguous().numpy().tobytes())] ^= 1
    path.write_bytes(spoilt)
    assert refusal(path) == "damaged: model.conv_in.weight does not match its checksum"
    load_weights(path)  # which needs, and reads, the EMA alone


def test_the_length_of_a_header_is_judged_before_it_is_read(path, monkeypatch):
    monkeypatch.setattr(files, "safe_open", None)
    for length in (LONGEST_HEADER + 1, 2**40, 2**63, 2**64 - 1):
        # Far below, and beyond, what the header claims; the file has holes
        for size in (100, 2**42):
            with open(path, "wb") as file:
                file.write(length.to_bytes(8, "little") + b"{")
                file.truncate(size)
            assert "truncated, damaged or not a checkpoint" in refusal(path)


@pytest.mark.slow
def test_headers_that_lie(path, whole):
    entry = lambda **changes: lambda header: header[WEIGHT].update(changes)
    shape, (start, end) = (
        json.loads(header_of(whole))[WEIGHT][name] for name in ("shape", "data_offsets")
    )
    for change in (
        entry(data_offsets=[start - 4, end - 4]),
        entry(data_offsets=[start, end + 4]),
        entry(data_offsets=[end, start]),
        entry(data_offsets=[-4, end]),
        entry(data_offsets=[0, 2**63]),
        entry(data_offsets=[start]),
        entry(dtype="I32"),
        entry(dtype="F64"),
        entry(dtype="F8_E4M3"),
        entry(dtype="nonsense"),
        entry(shape=shape[::-1]),
        entry(shape=[2**62, 4]),
        entry(shape=[-1]),
        entry(shape=[1.5]),
        entry(shape=[1] * 10**6 + shape),
        lambda header: header.update({"ema.odd": header.pop(WEIGHT)}),
        lambda header: header.pop(WEIGHT),
        lambda header: header.pop("__metadata__"),
        lambda header: header.update(__metadata__={"format": 5}),
        lambda header: header["__metadata__"].update(
            contents=header["__metadata__"]["contents"] + " "
        ),
        lambda header: header.update(
            {
                f"odd.{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
                for i in range(200_000)
            }
        ),
    ):
        header = json.loads(header_of(whole))
        change(header)
        path.write_bytes(with_header(whole, header))
        refusal(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "bomb",
    [
        b"[" * LONGEST_HEADER,
        b'{"a":' * 10**6,
        b"9" * 10**7,
        b"[" + b"[]," * 2_000_000 + b"0]",
        b'{"a":1,' + b'"a":1,' * 10**6 + b'"a":1}',
        b"\xff" * 1000,
        b"",
        b"null",
        b"5",
        b'"text"',
        b"{}",
    ],
)
def test_json_made_to_do_harm(path, whole, bomb):
    path.write_bytes(with_header(whole, bomb[:LONGEST_HEADER]))
    refusal(path)
    path.write_bytes(with_contents(whole, bomb[: 15 * 10**6].decode(errors="replace")))
    assert "contents" in refusal(path)
    if bomb[-1:] in (b"}", b"]"):  # and inside contents that are right
        path.write_bytes(
            with_contents(whole, f'{contents_text(whole)[:-1]}, "config": {bomb.decode()}}}')
        )
        refusal(path, sample)


@pytest.mark.parametrize("part", PARTS)
def test_nesting_that_just_reads(path, whole, part):
    """Later steps must not stumble over what the first one let pass."""
    for depth in (500, *range(900, 1000, 7)):
        deep = "[" * depth + "]" * depth
        path.write_bytes(
            with_contents(whole, f'{contents_text(whole)[:-1]}, "{part}": {{"scale": {deep}}}}}')
        )
        refusal(path, resume if part == "scaler" else sample)


@pytest.mark.parametrize(
    ("place", "values", "message"),
    [
        *(
            (part, (None, [], "text"), f"its part '{part}' is missing or malformed")
            for part in PARTS
        ),
        ("run/step", (91, True, -1, "5", math.nan, 5.0), "no proper 'step'"),
        ("run/total_steps", (10**9, None), "no proper 'total_steps'"),
        ("run/experiment", (None,), "no proper 'experiment'"),
        ("scaler/scale", (0.0, math.inf, math.nan, 10**400, 2), "its gradient scaler has scale "),
        ("scaler/_growth_tracker", (-1, 2**31, 0.5), "its gradient scaler has scale "),
        ("checksums", ([WEIGHT],), "its contents do not read"),
        ("checksums/odd", ("0",), "not those that its contents name"),
        (
            f"checksums/{WEIGHT}",
            ("0" * 64, None, [], "ä"),
            f"damaged: {WEIGHT} does not match its checksum",
        ),
        ("config/diffusion/timesteps_diff", (10**12,), "timesteps_diff is above 1,000,000"),
        ("config/diffusion/beta_end", (math.nan,), "ValueError"),
        ("config/model/base_dim", (10**9,), "base_dim is above 16,384"),
        ("config/model/base_dim", ("8",), "TypeError"),
        ("config/model/image_size", (2**40,), "image_size is above 16,384"),
        ("config/model/dim_multiply", ([1] * 10**5,), "levels is above 15"),
        ("config/model/norm_groups", (0,), "ZeroDivisionError"),
        ("config/model/norm_groups", (5,), "describes no model"),
        ("config/model/unknown", (1,), "describes no model"),
        ("config/diffusion/objective", ("x_0", None, [], 1), "it can be eps or v"),
        (
            "config/diffusion/beta_schedule",
            ("x_0", None, [], 1),
            "there must be 2 or more, linear or cosine",
        ),
    ],
)
def test_contents_that_cannot_be(path, whole, place, values, message):
    """Nor that would take all memory, or all day."""
    *parts, last = place.split("/")
    for value in values:
        contents = json.loads(contents_text(whole))
        owner = functools.reduce(dict.get, parts, contents)
        owner[last] = value
        path.write_bytes(with_contents(whole, contents))
        assert message in refusal(path, sample if parts[:1] == ["config"] else resume)
    if not parts:
        del contents[last]
        path.write_bytes(with_contents(whole, contents))
        refusal(path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "model.conv_in.weight",
            lambda t: t * torch.nan,
            "model.conv_in.weight holds numbers that are not finite",
        ),
        (
            "ema.conv_in.weight",
            lambda t: t - torch.inf,
            "conv_in.weight holds numbers that are not finite",
        ),
        (
            "ema.conv_in.weight",
            lambda t: t.to(torch.float8_e5m2),
            "is torch.float8_e5m2, which no weights are",
        ),
        (
            "exp_avg.conv_in.bias",
            lambda t: t / 0,
            "exp_avg.conv_in.bias holds numbers that are not finite",
        ),
        ("exp_avg_sq.conv_in.bias", lambda t: -t - 1, "exp_avg_sq.conv_in.bias is negative"),
        ("step.conv_in.bias", lambda t: -t, "step.conv_in.bias is negative"),
        (
            "step.conv_in.bias",
            lambda t: t[None],
            "conv_in.bias is torch.float32 (1,); the model has",
        ),
        (
            "ema.conv_in.bias",
            lambda t: t[:1],
            "conv_in.bias is torch.float32 (1,); the model has torch.float32 (4,)",
        ),
        (
            "ema.conv_in.bias",
            lambda t: t.double(),
            "conv_in.bias is torch.float64 (4,); the model has",
        ),
        (
            "exp_avg.conv_in.bias",
            lambda t: t.bfloat16(),
            "conv_in.bias is torch.bfloat16 (4,); the model has",
        ),
        (
            "exp_avg.conv_in.bias",
            lambda t: t.reshape([1] * 5000 + [4]),
            "conv_in.bias is torch.float32 (1, 1,",
        ),
        *(
            (f"{part}.conv_in.bias", None, "1 weights are missing or unknown, ")
            for part in ("model", "ema", "step", "exp_avg", "exp_avg_sq")
        ),
    ],
)
def test_tensors_that_cannot_be(path, name, change, message, monkeypatch):
    tensors, contents = checkpoint_parts()
    tensor = tensors.pop(name)
    with monkeypatch.context() as patch:
        patch.setitem(files.TYPES, torch.float8_e5m2, "F8_E5M2")
        write_tensors(path, {**tensors, **({name: change(tensor)} if change else {})}, contents)
    assert message in refusal(path, resume)
    if name.startswith("ema."):
        assert message in refusal(path, sample)


def test_files_of_others_and_of_earlier_versions(path):
    weights = {"weight": torch.ones(2)}
    for metadata in (
        None,
        {"format": "pt"},
        {"format": "ddpm-faces checkpoint 1", "sha256": "0", "run": "{}"},
    ):
        save_file(weights, path, metadata)
        assert "not a checkpoint of this version" in refusal(path)
    torch.save(weights, path)
    assert "not a checkpoint of this version (see CHANGELOG.md)" in refusal(path)
    path.write_bytes(b"\x80\x02}q\x00.")  # a pickle
    refusal(path)


@posix
def test_what_is_no_file_or_cannot_be_read(path, whole, tmp_path, monkeypatch):
    pipe, loop = tmp_path / "pipe", tmp_path / "loop"
    os.mkfifo(pipe)  # to open it would wait for a writer
    loop.symlink_to(loop)
    (tmp_path / "folder.safetensors").mkdir()
    for odd in (pipe, tmp_path / "folder.safetensors", type(path)("/dev/zero")):
        assert refusal(odd) == "not a regular file"
    for missing in (loop, path.with_name("missing"), path / "below"):
        assert refusal(missing) == "there is no such file"
    # An `OSError` would end the program; now it takes the checkpoint before
    fails = lambda *_: os.read(-1, 1)
    monkeypatch.setattr(files, "open", fails, raising=False)
    assert refusal(path) == "Bad file descriptor"
