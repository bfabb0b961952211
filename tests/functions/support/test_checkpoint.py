"""Checkpoints: what is written comes back bit for bit, in little memory, or the old file stays."""

import copy
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from functions.support import checkpoint, files
from functions.support.checkpoint import (
    TrainingState,
    check_whole,
    export_weights,
    load_weights,
    save_checkpoint,
)
from functions.support.errors import CheckpointError
from functions.support.files import TensorFile, write_tensors, write_whole
from tests.forked import Program
from tests.peak_memory import at_most
from tests.spoilt_files import checkpoint_parts, same, snapshot, stepped_state, training_state

CONFIG = {"diffusion": {"timesteps_diff": 10}, "model": {"base_dim": 8}}
RUN = {
    "experiment": "faces",
    "step": 5,
    "total_steps": 9,
    "nested": {"losses": [0.1, -1e-310, 2**60, None, "ü\n"]},
}


def test_a_training_comes_back_bit_for_bit(path):
    """Weights, average, Adam's moments and steps, scaler: in a training whose layout stays. Both then step alike."""
    saved, other = copy.deepcopy(stepped_state(0)), training_state(seed=1)
    with torch.no_grad():
        next(saved.ema_model.parameters()).sub_(1)  # so that it is no copy of the model
    assert saved.model.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    save_checkpoint(path, CONFIG, RUN, saved)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    file = check_whole(path)
    assert (file.contents["config"], file.contents["run"]) == (CONFIG, RUN)
    assert not same(snapshot(other)[:3], snapshot(saved)[:3])
    other.load(file)
    assert same(snapshot(other), snapshot(saved))
    for parameter in other.model.parameters():
        moments = other.optimizer.state[parameter]
        assert set(moments) == set(checkpoint.MOMENTS)
        assert parameter.stride() == moments["exp_avg"].stride() == moments["exp_avg_sq"].stride()
    assert other.model.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    for state in (saved, other):
        for parameter in state.model.parameters():
            parameter.grad = torch.full_like(parameter, 0.1)
        state.optimizer.step()
    assert same(snapshot(other), snapshot(saved))
    with pytest.raises(CheckpointError, match="unknown, 'ema"):  # a run without EMA is another run
        TrainingState(other.model, None, other.optimizer, other.scaler).load(file)


@pytest.mark.parametrize("dtype", files.TYPES)
def test_tensors_of_every_type_and_shape_come_back(path, dtype):
    shapes = [(), (0,), (3,), (2, 3, 4, 5), (1, 1, 7, 1)]
    tensors = {f"ü.{i}": (100 * torch.randn(shape)).to(dtype) for i, shape in enumerate(shapes)}
    tensors |= {
        f"of {other.itemsize} bytes": torch.ones(3, dtype=other)
        for other in (torch.bfloat16, torch.float64)
    }
    tensors["ü.3"] = tensors["ü.3"].to(memory_format=torch.channels_last)
    tensors["transposed"] = tensors["ü.3"].mT
    write_tensors(path, tensors, {"not": [math.nan, math.inf]})
    file = TensorFile(path)
    assert same(file.tensors(), tensors) and same(file.contents, {"not": [math.nan, math.inf]})


def test_sampling_takes_the_average_if_there_is_one(path):
    tensors, contents = checkpoint_parts()
    for part, kind in (("ema.", "EMA"), ("model.", "raw")):
        write_tensors(
            path,
            {name: t for name, t in tensors.items() if part == "ema." or "ema." not in name},
            contents,
        )
        saved = load_weights(path)
        assert saved.kind == kind
        assert same(
            saved.weights,
            {n.removeprefix(part): t for n, t in tensors.items() if n.startswith(part)},
        )
        assert (saved.config, saved.run, saved.image_shape) == (
            contents["config"],
            contents["run"],
            (3, 4, 4),
        )
        assert str(saved) == f"{kind} weights after 5 of 90 steps, hash {saved.digest[:16]}"


def test_an_exported_file_is_a_part_of_the_checkpoint(path, tmp_path):
    tensors, contents = checkpoint_parts()
    write_tensors(path, tensors, contents)
    original, exported = load_weights(path), tmp_path / "faces.safetensors"
    export_weights(original, exported)
    again = load_weights(exported)
    assert again.digest == original.digest and same(again.weights, original.weights)
    assert (again.kind, again.config, again.run) == (original.kind, original.config, original.run)
    part = {name: tensor for name, tensor in tensors.items() if name.startswith("ema.")}
    assert same(TensorFile(exported).tensors(), part)
    tensors["ema.conv_in.bias"][0] += 1
    write_tensors(path, tensors, contents)
    other = load_weights(path).digest
    contents["config"]["diffusion"]["timesteps_diff"] += 1
    write_tensors(path, tensors, contents)
    assert len({original.digest, other, load_weights(path).digest}) == 3


def save_105_megabytes():
    """In channels_last, which the file is not in."""
    layers = lambda: nn.Sequential(*(nn.Conv2d(256, 256, 5) for _ in range(4)))
    model, ema = (layers().to(memory_format=torch.channels_last) for _ in range(2))
    state = TrainingState(
        model, ema, torch.optim.Adam(model.parameters()), torch.amp.GradScaler("cpu", enabled=False)
    )
    with at_most(30):
        save_checkpoint(Path(sys.argv[1]), {}, {}, state)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_checkpoint_is_written_with_hardly_any_memory(path, tmp_path):
    program = Program(tmp_path / "printed", path, act=save_105_megabytes)
    assert program.wait() == 0, program.printed
    assert path.stat().st_size > 100e6


def test_the_whole_file_is_on_the_disk_before_it_has_its_name(path, monkeypatch):
    flushed, original = {}, os.fsync

    def fsync(descriptor):
        flushed[os.fstat(descriptor).st_ino] = (os.fstat(descriptor).st_size, path.exists())
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_tensors(path, *checkpoint_parts())
    assert flushed[path.stat().st_ino] == (path.stat().st_size, False)
    if os.name == "posix":
        assert flushed[path.parent.stat().st_ino][1]  # its name too
        os.umask(mask := os.umask(0))
        # Others may read it as they may other files
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_write_that_fails_leaves_the_old_file_and_no_other(path):
    def write_half(file):
        file.write(b"new")
        raise OSError(28, "No space left on device")

    write_whole(path, lambda file: file.write(b"old"))
    with pytest.raises(OSError, match="No space") as error:
        write_whole(path, write_half)
    assert error.value.filename == str(path)
    assert path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path]
