"""Checkpoints that are damaged, or made to do harm: each is refused in a sentence that names it."""

import pytest
import torch

from functions.support import checkpoint
from functions.support.checkpoint import load_weights, verify_checkpoint, write_tensors
from functions.support.errors import CheckpointError, UserError
from functions.support.loading import rebuild
from tests.conftest import CPU
from tests.spoilt_files import checkpoint_parts, same, snapshot, stepped_run


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


def test_a_cut_or_a_flipped_bit_anywhere(path):
    """It is in the header's length, in the contents, their checksum, a name or the numbers."""
    write_tensors(path, *checkpoint_parts())
    whole = path.read_bytes()
    places = [0, 8, len(whole) - 1]
    # These digits differ from others in one bit.
    for text in (rb"\"step\": 1", b'"sha256":"', b"exp_avg"):
        places.append(whole.index(text) + len(text))
    for place in places:
        path.write_bytes(whole[:place])
        assert "truncated" in refusal(path)
        spoilt = bytearray(whole)
        spoilt[place - 1] ^= 1
        path.write_bytes(spoilt)
        refusal(path)


@pytest.mark.parametrize("part", ["model", "ema", "optimizer"])
def test_a_damaged_part_is_named_and_sampling_needs_only_its_own(part, path):
    parts, contents = checkpoint_parts()
    name = "exp_avg.conv_in.bias" if part == "optimizer" else "conv_in.bias"
    before = parts[part][name].fill_(1.25)
    write_tensors(path, parts, contents)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(before.numpy().tobytes(), (2 * before).numpy().tobytes()))

    assert refusal(path) == f"damaged: {part} does not match its checksum"
    if part == "ema":
        refusal(path, sample)
    else:
        sample(path)


@pytest.mark.parametrize(
    ("place", "value", "read", "message"),
    [
        ("config", None, resume, "malformed"),
        ("run/step", "5", resume, "malformed"),
        ("window/sums", [1, 2, 3], resume, "malformed"),
        ("scaler", "text", resume, "malformed"),
        ("config/diffusion/objective", "x_0", sample, "cannot build a model from its config"),
    ],
)
def test_contents_that_cannot_be(path, place, value, read, message):
    parts, contents = checkpoint_parts()
    *parents, last = place.split("/")
    owner = contents
    for parent in parents:
        owner = owner[parent]
    owner[last] = value
    write_tensors(path, parts, contents)
    assert message in refusal(path, read)


@pytest.mark.parametrize(
    ("part", "name", "change", "message"),
    [
        ("ema", "conv_in.bias", lambda t: t[:1], "torch.float32 (1,); the model has"),
        ("ema", "conv_in.bias", None, "1 weights are missing or unknown, such as 'conv_in.bias'"),
        ("optimizer", "step.conv_in.bias", lambda t: t - 2, "conv_in.bias has negative numbers"),
        ("optimizer", "exp_avg.conv_in.bias", lambda t: t.bfloat16(), "is torch.bfloat16 (4,)"),
        ("optimizer", "exp_avg_sq.conv_in.bias", lambda t: -t, "conv_in.bias has negative numbers"),
    ],
)
def test_tensors_that_cannot_be(path, part, name, change, message):
    parts, contents = checkpoint_parts()
    tensor = parts[part].pop(name)
    if change:
        parts[part][name] = change(tensor)
    write_tensors(path, parts, contents)
    assert message in refusal(path, resume)
    if part == "ema":
        assert message in refusal(path, sample)


def test_files_of_others_and_of_earlier_versions(path, monkeypatch):
    torch.save({"weight": torch.ones(2)}, path)
    assert "not a checkpoint of this version (see CHANGELOG.md)" in refusal(path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", "ddpm-faces checkpoint 2")
        write_tensors(path, *checkpoint_parts())
    assert "not a checkpoint of this version" in refusal(path)
    assert refusal(path.parent) == "there is no such file"
