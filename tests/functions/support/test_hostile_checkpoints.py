"""Checkpoints that are damaged, or made to do harm.

Each is refused in a sentence that names it, in little time and memory.
"""

import json
import math
import os
import time

import pytest
import torch
from safetensors.torch import save_file

from functions.sampling.generation import rebuild
from functions.support import files
from functions.support.checkpoint import load_weights, verify_checkpoint
from functions.support.errors import CheckpointError, UserError
from functions.support.files import MAX_HEADER, write_tensors
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


def refusal(path, read=verify_checkpoint):
    """Assert that a file is refused as it should be, and return what is said of it.

    It is one short line that begins with the file's name; it comes soon and takes little memory.
    """
    start = time.process_time()
    with at_most(400), pytest.raises(CheckpointError) as caught:
        read(path)
    seconds = time.process_time() - start
    assert seconds < 60

    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    assert len(message) < len(str(path)) + 400
    return message.removeprefix(f"{path}: ")


def resume(path):
    """Let a training take a checkpoint over; one that is refused must have changed nothing."""
    state = spoilt_files.stepped_state(1)
    before = snapshot(state)
    try:
        state.load(verify_checkpoint(path))
    except UserError:
        assert same(snapshot(state), before)
        raise


def sample(path):
    return rebuild(load_weights(path), torch.device("cpu"))


def test_truncated_files(path, whole):
    header_end = 8 + len(header_of(whole))
    ends = {
        # The file ends within the length of the header, or soon after it.
        *range(0, 20),
        # The file ends near the end of the header.
        *range(header_end - 3, header_end + 20),
        # The file ends anywhere, or lacks its last byte alone.
        *range(0, len(whole), 997),
        len(whole) - 1,
    }
    for end in sorted(ends):
        path.write_bytes(whole[:end])
        assert "truncated" in refusal(path)


def test_a_flipped_bit_anywhere(path, whole):
    """A bit flips in the length, the header, the contents, the checksums or the numbers."""
    places = {*range(0, 20), *range(20, len(whole), 1499), whole.index(b"exp_avg"), len(whole) - 1}
    for place in sorted(places):
        spoilt = bytearray(whole)
        spoilt[place] ^= 1 << place % 8
        path.write_bytes(spoilt)
        refusal(path)

    # The message names the tensor whose numbers are damaged.
    weight = checkpoint_parts()[0]["model.conv_in.weight"]
    numbers = weight.contiguous().numpy().tobytes()
    spoilt = bytearray(whole)
    spoilt[whole.index(numbers)] ^= 1
    path.write_bytes(spoilt)
    assert refusal(path) == "damaged: model.conv_in.weight does not match its checksum"

    # Sampling needs, and reads, the average alone.
    load_weights(path)


def test_the_length_of_a_header_is_judged_before_it_is_read(path, monkeypatch):
    monkeypatch.setattr(files, "safe_open", None)
    for length in (MAX_HEADER + 1, 2**40, 2**63, 2**64 - 1):
        # The file is shorter than its header claims to be, or 4 TB of holes that take no room.
        for size in (100, 2**42):
            with open(path, "wb") as file:
                file.write(length.to_bytes(8, "little") + b"{")
                file.truncate(size)
            assert "truncated, damaged or not a checkpoint" in refusal(path)


def entry(**fields):
    """Return a function that changes fields of a weight's entry in a header."""
    return lambda header: header[WEIGHT].update(fields)


def add_200_000_tensors(header):
    for i in range(200_000):
        header[f"odd.{i}"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


@pytest.mark.slow
def test_headers_that_lie(path, whole):
    weight = json.loads(header_of(whole))[WEIGHT]
    shape = weight["shape"]
    start, end = weight["data_offsets"]
    changes = (
        # The numbers lie elsewhere, overlap others, or are more or fewer than the shape has.
        entry(data_offsets=[start - 4, end - 4]),
        entry(data_offsets=[start, end + 4]),
        entry(data_offsets=[end, start]),
        entry(data_offsets=[-4, end]),
        entry(data_offsets=[0, 2**63]),
        entry(data_offsets=[start]),
        # The type has the same width, another one, or is none.
        entry(dtype="I32"),
        entry(dtype="F64"),
        entry(dtype="F8_E4M3"),
        entry(dtype="nonsense"),
        # The shape has as many numbers, as many as overflow, or is none.
        entry(shape=shape[::-1]),
        entry(shape=[2**62, 4]),
        entry(shape=[-1]),
        entry(shape=[1.5]),
        entry(shape=[1] * 10**6 + shape),
        # Names are wrong, or missing.
        lambda header: header.update({"ema.odd": header.pop(WEIGHT)}),
        lambda header: header.pop(WEIGHT),
        lambda header: header.pop("__metadata__"),
        # The metadata are not ours, or do not match their checksum.
        lambda header: header.update(__metadata__={"format": 5}),
        lambda header: header["__metadata__"].update(contents=contents_text(whole) + " "),
        add_200_000_tensors,
    )
    for change in changes:
        header = json.loads(header_of(whole))
        change(header)
        path.write_bytes(with_header(whole, header))
        refusal(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "bomb",
    [
        b"[" * MAX_HEADER,
        b'{"a":' * 10**6,
        b"9" * 10**7,
        b"[" + b"[]," * 200_000 + b"0]",
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
    """It stands in the place of the header, of the contents, or of one of their parts."""
    path.write_bytes(with_header(whole, bomb[:MAX_HEADER]))
    refusal(path)

    text = bomb[: 15 * 10**6].decode(errors="replace")
    path.write_bytes(with_contents(whole, text))
    assert "damaged" in refusal(path)

    # Only whole dicts and lists leave the contents around them proper JSON.
    if bomb[-1:] in (b"}", b"]"):
        unclosed = contents_text(whole)[:-1]
        path.write_bytes(with_contents(whole, f'{unclosed}, "config": {bomb.decode()}}}'))
        refusal(path, sample)


@pytest.mark.parametrize("part", ["config", "run"])
def test_nesting_that_just_reads(path, whole, part):
    """Later steps must not stumble over what the first one let pass."""
    unclosed = contents_text(whole)[:-1]
    for depth in (500, *range(900, 1000, 7)):
        deep = "[" * depth + "]" * depth
        path.write_bytes(with_contents(whole, f'{unclosed}, "{part}": {{"scale": {deep}}}}}'))
        refusal(path, sample)


@pytest.mark.parametrize(
    ("place", "values", "message"),
    [
        *(
            (part, (None, [], "text"), f"its part '{part}' is missing or malformed")
            for part in PARTS
        ),
        ("run/step", (91, True, -1, "5", math.nan, 5.0), "'step' is missing or malformed"),
        ("run/total_steps", (10**9, None), "'total_steps' is missing or malformed"),
        ("run/experiment", (None,), "'experiment' or 'arithmetic' is malformed"),
        ("checksums", ([WEIGHT],), "truncated, damaged or"),
        ("checksums/odd", ("0",), "truncated, damaged or"),
        (
            f"checksums/{WEIGHT}",
            ("0" * 64, None, [], "ä"),
            f"damaged: {WEIGHT} does not match its checksum",
        ),
        ("config/diffusion/timesteps_diff", (10**12,), "use 2 to 1,000,000 timesteps"),
        ("config/diffusion/beta_end", (math.nan,), "ValueError"),
        ("config/model/base_dim", (10**9,), "base_dim is 1000000000; it must be from 4 to 16,384"),
        ("config/model/base_dim", ("8",), "base_dim is '8'; it must be an integer"),
        ("config/model/image_size", (2**40,), "it must be from 1 to 16,384"),
        ("config/model/dim_multiply", ([1] * 10**5,), "it must be a list of 1, one for each"),
        ("config/model/dim_multiply", ([1, 10**9],), "it must be from 1 to 1,024"),
        ("config/model/norm_groups", (0,), "norm_groups is 0; it must be 1 or more"),
        ("config/model/norm_groups", (5,), "cannot build a model from its config"),
        ("config/model/unknown", (1,), "cannot build a model from its config"),
        ("config/diffusion/objective", ("x_0", None, [], 1), "it can be eps or v"),
        (
            "config/diffusion/beta_schedule",
            ("x_0", None, [], 1),
            "use 2 to 1,000,000 timesteps, and 'linear' or 'cosine'",
        ),
    ],
)
def test_contents_that_cannot_be(path, whole, place, values, message):
    """Values are refused that make no sense, or that would take all memory, or all day."""
    *parents, last = place.split("/")
    read = sample if place.startswith("config/") else resume
    for value in values:
        contents = json.loads(contents_text(whole))
        owner = contents
        for parent in parents:
            owner = owner[parent]
        owner[last] = value
        path.write_bytes(with_contents(whole, contents))
        assert message in refusal(path, read)

    # A part that is not there is refused, too.
    if not parents:
        del contents[last]
        path.write_bytes(with_contents(whole, contents))
        refusal(path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "model.conv_in.weight",
            lambda t: t * torch.nan,
            "model.conv_in.weight has numbers that are not finite",
        ),
        (
            "ema.conv_in.weight",
            lambda t: t - torch.inf,
            "conv_in.weight has numbers that are not finite",
        ),
        (
            "ema.conv_in.weight",
            lambda t: t.to(torch.float8_e5m2),
            "is torch.float8_e5m2, but weights cannot be",
        ),
        (
            "exp_avg.conv_in.bias",
            lambda t: t / 0,
            "exp_avg.conv_in.bias has numbers that are not finite",
        ),
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
    if change:
        tensors[name] = change(tensor)
    with monkeypatch.context() as patch:
        # Only for this test our files can be written with a type that they never have.
        patch.setitem(files.TYPES, torch.float8_e5m2, "F8_E5M2")
        write_tensors(path, tensors, contents)

    assert message in refusal(path, resume)
    if name.startswith("ema."):
        assert message in refusal(path, sample)


def test_files_of_others_and_of_earlier_versions(path):
    weights = {"weight": torch.ones(2)}
    earlier = {"format": "ddpm-faces checkpoint 1", "sha256": "0", "run": "{}"}
    for metadata in (None, {"format": "pt"}, earlier):
        save_file(weights, path, metadata)
        assert "not a checkpoint of this version" in refusal(path)

    torch.save(weights, path)
    assert "not a checkpoint of this version (see CHANGELOG.md)" in refusal(path)

    # This is a pickle of an empty dict.
    path.write_bytes(b"\x80\x02}q\x00.")
    refusal(path)


@posix
def test_what_is_no_file_or_cannot_be_read(path, whole, tmp_path, monkeypatch):
    # To open the pipe would wait for a writer.
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    odd_folder = tmp_path / "folder.safetensors"
    odd_folder.mkdir()
    for odd in (pipe, odd_folder, type(path)("/dev/zero")):
        assert refusal(odd) == "not a regular file"

    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for missing in (loop, path.with_name("missing"), path / "below"):
        assert refusal(missing) == "there is no such file"

    # An OSError would end the program, but this error lets it take the checkpoint before.
    def fail(*_):
        os.read(-1, 1)

    monkeypatch.setattr(files, "open", fail, raising=False)
    assert refusal(path) == "Bad file descriptor"
