"""Checkpoints that are damaged, or made to do harm: each is refused in a sentence that names it."""

import json
import math
import os

import pytest
import torch
from safetensors.torch import save_file

from functions.support.checkpoint import cpu_copies, load_weights, verify_checkpoint, write_tensors
from functions.support.errors import CheckpointError, UserError
from functions.support.loading import rebuild
from tests.conftest import CPU, posix
from tests.spoilt_files import (
    checkpoint_parts,
    contents_text,
    header_of,
    same,
    snapshot,
    stepped_run,
    with_contents,
)


@pytest.fixture
def whole(path):
    write_tensors(path, *checkpoint_parts())
    return path.read_bytes()


def refusal(path, read=verify_checkpoint):
    """Return what is said of a file, which is one short line that begins with its name."""
    with pytest.raises(CheckpointError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    assert len(message) < len(str(path)) + 400
    return message.removeprefix(f"{path}: ")


def resume(path):
    """Let a training take a checkpoint over; one that is refused must have changed nothing."""
    run = stepped_run(1)
    before = snapshot(run)
    try:
        run.load(verify_checkpoint(path))
    except UserError:
        assert same(snapshot(run), before)
        raise


def sample(path):
    return rebuild(load_weights(path), CPU)


def test_truncated_files(path, whole):
    # The file ends in the length of its header, in the header, in the numbers, or a byte too soon.
    header_end = 8 + len(header_of(whole))
    for end in (0, 1, 8, 9, header_end - 1, header_end, header_end + 1, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert "truncated" in refusal(path)


def test_a_flipped_bit_anywhere(path, whole):
    """A bit flips in the length, the header, the contents, the checksums or the numbers."""
    places = {*range(0, 20), *range(20, len(whole), 1499), whole.index(b"exp_avg"), len(whole) - 1}
    for place in places:
        spoilt = bytearray(whole)
        spoilt[place] ^= 1 << place % 8
        path.write_bytes(spoilt)
        refusal(path)

    # These digits differ in one bit.
    path.write_bytes(whole.replace(rb"\"step\": 1", rb"\"step\": 3"))
    refusal(path)


@pytest.mark.parametrize("part", ["model", "ema", "optimizer"])
def test_a_damaged_part_is_named_and_sampling_needs_only_its_own(part, path, whole):
    parts, _ = checkpoint_parts()
    # The model and its average are equal, and the average comes first in the file.
    numbers = cpu_copies(parts[part])[{"optimizer": "exp_avg."}.get(part, "") + "conv_in.weight"]
    find = whole.rindex if part == "model" else whole.index
    spoilt = bytearray(whole)
    spoilt[find(numbers.numpy().tobytes())] ^= 1
    path.write_bytes(spoilt)

    assert refusal(path) == f"damaged: {part} does not match its checksum"
    if part == "ema":
        refusal(path, sample)
    else:
        sample(path)


@pytest.mark.parametrize(
    ("place", "values"),
    [
        ("config", (None, [], "text")),
        ("run", (None, [], "text")),
        ("run/step", (None, True, "5", math.nan, 5.0)),
        ("run/total_steps", (None,)),
        ("run/experiment", (None, 5)),
        ("window", (None, [], {})),
        ("window/sums", (None, "text", [1, 2, 3])),
        ("window/skipped", (None, "text")),
        ("scaler", ("text", [5])),
        ("config/diffusion/timesteps_diff", (None, 10**12)),
        ("config/diffusion/objective", ("x_0", None, [], 1)),
        ("config/model/base_dim", ("8", 10**9)),
    ],
)
def test_contents_that_cannot_be(path, whole, place, values):
    *parents, last = place.split("/")
    for value in values:
        contents = json.loads(contents_text(whole))
        owner = contents
        for parent in parents:
            owner = owner[parent]
        owner[last] = value
        path.write_bytes(with_contents(whole, contents))
        if "config/" in place:
            assert "cannot build a model from its config" in refusal(path, sample)
        else:
            assert "malformed" in refusal(path, resume)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("ema.conv_in.bias", lambda t: t[:1], "conv_in.bias is torch.float32 (1,); the model has"),
        ("optimizer.step.conv_in.bias", lambda t: t - 2, "conv_in.bias has negative numbers"),
        ("optimizer.exp_avg.conv_in.bias", lambda t: t.bfloat16(), "is torch.bfloat16 (4,)"),
        ("optimizer.exp_avg_sq.conv_in.bias", lambda t: -t, "conv_in.bias has negative numbers"),
        ("ema.conv_in.bias", None, "1 weights are missing or unknown, such as 'conv_in.bias'"),
        ("model.conv_in.bias", None, "1 weights are missing or unknown, such as 'conv_in.bias'"),
    ],
)
def test_tensors_that_cannot_be(path, name, change, message):
    parts, contents = checkpoint_parts()
    part, name = name.split(".", 1)
    tensor = parts[part].pop(name)
    if change:
        parts[part][name] = change(tensor)
    write_tensors(path, parts, contents)

    assert message in refusal(path, resume)
    if part == "ema":
        assert message in refusal(path, sample)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite(path, value, monkeypatch):
    parts, contents = checkpoint_parts()
    parts["ema"]["conv_in.weight"][0, 0, 0, 0] = value
    with monkeypatch.context() as patch:
        # Our own files never have such numbers.
        patch.setattr("functions.support.checkpoint.is_finite", lambda tensor: True)
        write_tensors(path, parts, contents)
    assert "conv_in.weight has numbers that are not finite" in refusal(path)


def test_files_of_others_and_of_earlier_versions(path, monkeypatch):
    weights = {"weight": torch.ones(2)}
    for metadata in (None, {"format": "pt"}):
        save_file(weights, path, metadata)
        assert "not a checkpoint of this version (see CHANGELOG.md)" in refusal(path)

    torch.save(weights, path)
    assert "not a checkpoint of this version" in refusal(path)

    with monkeypatch.context() as patch:
        patch.setattr("functions.support.checkpoint.FORMAT", "ddpm-faces checkpoint 2")
        write_tensors(path, *checkpoint_parts())
    assert "not a checkpoint of this version" in refusal(path)


@posix
def test_what_is_no_file(path, tmp_path):
    # To open the pipe would wait for a writer.
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for odd in (pipe, tmp_path):
        assert refusal(odd) == "not a regular file"
    for missing in (path, pipe / "below"):
        assert refusal(missing) == "there is no such file"
