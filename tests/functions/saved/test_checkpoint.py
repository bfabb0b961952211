"""Checkpoints: what is written comes back bit for bit, or the old file stays."""

import os

import pytest
import safetensors.torch
import torch

from functions.sampling.export import export
from functions.saved.checkpoint import (
    Checkpoint,
    load_weights,
    verify_checkpoint,
    write_tensors,
)
from functions.support.files import replacing
from tests.small_training import same, stepped_run, training_run


def test_a_loss_scale_comes_back_and_memory_layouts_stay(path):
    """tests/functions/saved/test_survival.py has all that comes back on a CPU."""
    saved = stepped_run()
    saved.scaler.load_state_dict(saved.scaler.state_dict() | {"scale": 2.0, "_growth_tracker": 7})
    saved.save(path)
    other = training_run(1)
    other.load(verify_checkpoint(path))
    assert other.scaler.state_dict() == saved.scaler.state_dict()

    for parameter in other.model.parameters():
        assert other.optimizer.state[parameter]["exp_avg"].stride() == parameter.stride()
    assert other.model.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_file_is_one_of_safetensors_of_any_shape_and_layout(path):
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    tensors = {"ü": torch.tensor(1), "none": torch.ones(0, 3), "image": image}
    tensors["half"] = image.mT.half()
    contents = training_run().contents()
    write_tensors(path, {"a": tensors}, contents)

    file = Checkpoint(path)
    assert file.contents == contents
    assert same(file.tensors("a"), tensors)
    theirs = safetensors.torch.load_file(path)
    assert same(theirs, {f"a.{name}": tensor for name, tensor in tensors.items()})


@pytest.mark.parametrize("write", ["save", "save_snapshot"])
def test_an_exported_file_is_the_same_model(write, path, tmp_path):
    run = stepped_run()
    getattr(run, write)(path)
    original = load_weights(path)
    dtype = {"save": torch.float32, "save_snapshot": torch.float16}[write]
    assert same(original.weights, {n: t.to(dtype) for n, t in run.parts()["ema"].items()})

    steps = f"after 1 of {run.total_steps} steps"
    assert str(original) == f"EMA weights {steps}, hash {original.digest[:16]}"

    exported = tmp_path / "faces.safetensors"
    export(original, exported)
    assert same(vars(load_weights(exported)), vars(original) | {"path": exported})
    assert verify_checkpoint(exported).digests.keys() == {"ema"}


def test_the_whole_file_is_on_the_disk_before_it_has_its_name(path, monkeypatch):
    """Sizes are noted when files are flushed, and whether the name was there at that time."""
    flushed = {}
    original = os.fsync

    def fsync(descriptor):
        status = os.fstat(descriptor)
        flushed[status.st_ino] = (status.st_size, path.exists())
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_tensors(path, {"model": {"weight": torch.ones(1000)}}, {})
    assert flushed[path.stat().st_ino] == (path.stat().st_size, False)

    if os.name == "posix":
        # The folder, which holds the name, is flushed when the name is there.
        assert flushed[path.parent.stat().st_ino][1]

        # Other users may read a checkpoint as they may read other files.
        other = path.with_name("other")
        other.touch()
        assert path.stat().st_mode == other.stat().st_mode


def test_a_write_that_fails_leaves_the_old_file_and_no_other(path):
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="No space") as error, replacing(path) as temporary:
        temporary.write_bytes(b"new")
        raise OSError(28, "No space left on device")
    assert error.value.filename == str(path)

    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]
