"""Checkpoints that are damaged, or made to do harm: each is refused in a sentence that names it."""

import pytest
import torch

from functions.saved.checkpoint import verify_checkpoint, write_tensors
from functions.saved.loading import load_denoiser
from functions.support.errors import CheckpointError
from tests.small_training import stepped_run, training_run


def refusal(path, read=verify_checkpoint):
    """Return what is said of a file, which is one short line that begins with its name."""
    with pytest.raises(CheckpointError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    assert len(message) < len(str(path)) + 400
    return message.removeprefix(f"{path}: ")


@pytest.fixture
def saved(path):
    """Write a checkpoint; return its parts and contents, as `write_tensors` takes them."""
    stepped_run().save(path)
    file = verify_checkpoint(path)
    return {part: file.tensors(part) for part in file.digests}, file.contents


def resume(path):
    """Let a training take a checkpoint over."""
    training_run(1).load(verify_checkpoint(path))


def test_a_cut_or_a_flipped_bit_anywhere(path, saved):
    """It is in the header's length, contents, their checksum, the format, a name or the numbers."""
    whole = path.read_bytes()
    places = [0, 8, len(whole) - 1]
    # These digits differ from others in one bit.
    for text in (rb"\"step\": 1", b'"sha256":"', b"ddpm-faces", b"exp_avg"):
        places.append(whole.index(text) + len(text))
    for place in places:
        path.write_bytes(whole[:place])
        assert "truncated" in refusal(path)
        spoilt = bytearray(whole)
        spoilt[place - 1] ^= 1
        path.write_bytes(spoilt)
        refusal(path)


@pytest.mark.parametrize("part", ["model", "ema", "optimizer"])
def test_a_damaged_part_is_named_and_sampling_needs_only_its_own(part, path, saved):
    parts, contents = saved
    name = "exp_avg.conv_in.bias" if part == "optimizer" else "conv_in.bias"
    before = parts[part][name].fill_(1.25)
    write_tensors(path, parts, contents)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(before.numpy().tobytes(), (2 * before).numpy().tobytes()))

    assert refusal(path) == f"{part} is missing or damaged"
    if part == "ema":
        refusal(path, load_denoiser)
    else:
        load_denoiser(path)


@pytest.mark.parametrize("read", [resume, load_denoiser])
def test_a_network_that_was_changed(read, path, saved):
    parts, contents = saved
    bias = parts["ema"].pop("conv_in.bias")
    write_tensors(path, parts, contents)
    expected = "1 tensors are missing or unknown, such as 'conv_in.bias'"
    assert refusal(path, read) == expected

    parts["ema"]["conv_in.bias"] = bias[:1]
    write_tensors(path, parts, contents)
    assert refusal(path, read) == "conv_in.bias is (1,); the model has (4,)"


def test_what_a_training_needs(path, saved):
    parts, contents = saved
    del parts["model"]["conv_in.bias"]
    write_tensors(path, parts, contents)
    expected = "1 tensors are missing or unknown, such as 'conv_in.bias'"
    assert refusal(path, resume) == expected
    # An exported file has only this part.
    write_tensors(path, {"ema": parts["ema"]}, contents)
    assert refusal(path, resume) == "model is missing or damaged"


def test_files_of_others(path):
    torch.save({"weight": torch.ones(2)}, path)
    assert "not a checkpoint of this version" in refusal(path)
    assert refusal(path.parent) == "there is no such file"


@pytest.mark.parametrize(
    "place, value",
    [
        ("config diffusion objective", "noise"),
        ("config diffusion timesteps_diff", 10**30),
        ("config model base_dim", None),
        ("config model unknown", 1),
    ],
)
def test_contents_of_another_version(place, value, path, saved):
    """Their checksums are right."""
    parts, contents = saved
    *outer, last = place.split()
    inner = contents
    for name in outer:
        inner = inner[name]
    inner[last] = value
    write_tensors(path, parts, contents)
    refusal(path, load_denoiser)
