"""Checkpoints: what is written comes back bit for bit, in little memory, or the old file stays."""

import copy
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from functions.support import files
from functions.support.checkpoint import (
    MOMENTS,
    TrainingState,
    check_whole,
    export_weights,
    load_into,
    load_weights,
    save_checkpoint,
)
from functions.support.errors import CheckpointError
from functions.support.files import TensorFile, write_tensors, write_whole
from tests.conftest import ROOT
from tests.spoilt_files import checkpoint_parts, same, snapshot, stepped_state, training_state

CONFIG = {"diffusion": {"timesteps_diff": 10}, "model": {"base_dim": 8}}
RUN = {"experiment": "faces", "step": 5, "total_steps": 9, "nested": {"losses": [0.1, -1e-310, 2**60, None, "ü\n"]}}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "step-00000005.safetensors"


def test_a_training_comes_back_bit_for_bit(path):
    """Weights, their average, Adam's moments and steps, the scaler: in another training, whose layout stays."""
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
    expected = snapshot(saved)
    assert same(snapshot(other), expected)
    for parameter in other.model.parameters():
        moments = other.optimizer.state[parameter]
        assert set(moments) == set(MOMENTS)
        assert parameter.stride() == moments["exp_avg"].stride() == moments["exp_avg_sq"].stride()
    assert other.model.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(CheckpointError, match="unknown, 'ema"):  # a run without EMA is another run
        TrainingState(other.model, None, other.optimizer, other.scaler).load(file)


def test_the_next_step_is_that_of_the_saved_training(path):
    saved, other = copy.deepcopy(stepped_state(0)), training_state(seed=1)
    save_checkpoint(path, CONFIG, RUN, saved)
    other.load(TensorFile(path))
    for state in (saved, other):
        for parameter in state.model.parameters():
            parameter.grad = torch.full_like(parameter, 0.1)
        state.optimizer.step()
    assert same(snapshot(other), snapshot(saved))


@pytest.mark.parametrize("dtype", files.TYPES)
def test_tensors_of_every_type_and_shape_come_back(path, dtype):
    shapes = [(), (0,), (3,), (2, 3, 4, 5), (1, 1, 7, 1)]
    tensors = {f"ü.{i}": (100 * torch.randn(shape)).to(dtype) for i, shape in enumerate(shapes)}
    tensors |= {
        "odd": torch.ones(3, dtype=torch.bfloat16),
        "wide": torch.ones(3, dtype=torch.float64),
    }  # of other sizes
    tensors["ü.3"] = tensors["ü.3"].to(memory_format=torch.channels_last)
    tensors["transposed"] = tensors["ü.3"].mT
    write_tensors(path, tensors, {"not": [math.nan, math.inf]})
    file = TensorFile(path)
    assert same(file.tensors(), tensors)
    assert same(file.contents, {"not": [math.nan, math.inf]})


def test_sampling_takes_the_average_if_there_is_one(path):
    tensors, contents = checkpoint_parts()
    for part, kind in (("ema.", "EMA"), ("model.", "raw")):
        write_tensors(path, {name: t for name, t in tensors.items() if part == "ema." or "ema." not in name}, contents)
        saved = load_weights(path)
        assert saved.kind == kind
        assert same(saved.weights, {n.removeprefix(part): t for n, t in tensors.items() if n.startswith(part)})
        assert (saved.config, saved.run, saved.image_shape) == (contents["config"], contents["run"], (3, 4, 4))
        assert str(saved) == f"{path}: {kind} weights after 5 of 90 steps"


def test_sampling_reads_no_other_tensors(path, monkeypatch):
    asked = []

    class Watched:
        def __init__(self, *args, **options):
            self.file = original(*args, **options)

        def __enter__(self):
            inner = self.file.__enter__()
            read = lambda name: asked.append(name) or inner.get_tensor(name)
            return type("Inner", (), {"metadata": inner.metadata, "keys": inner.keys, "get_tensor": staticmethod(read)})

        def __exit__(self, *error):
            return self.file.__exit__(*error)

    write_tensors(path, *checkpoint_parts())
    original = files.safe_open
    monkeypatch.setattr(files, "safe_open", Watched)
    load_weights(path)
    assert sorted(asked) == sorted(name for name in checkpoint_parts()[0] if name.startswith("ema."))


def test_an_exported_file_is_a_part_of_the_checkpoint(path, tmp_path):
    tensors, contents = checkpoint_parts()
    write_tensors(path, tensors, contents)
    original, exported = load_weights(path), tmp_path / "faces.safetensors"
    export_weights(original, exported)
    again = load_weights(exported)
    assert again.digest == original.digest
    assert (again.kind, again.config, again.run) == (original.kind, original.config, original.run)
    assert same(again.weights, original.weights)
    part = {name: tensor for name, tensor in tensors.items() if name.startswith("ema.")}
    assert same(TensorFile(exported).tensors(), part)
    with pytest.raises(CheckpointError, match=r"must end in \.safetensors"):
        export_weights(original, tmp_path / "faces.st")
    digests = {original.digest}
    tensors["ema.conv_in.bias"][0] += 1
    write_tensors(path, tensors, contents)
    digests.add(load_weights(path).digest)
    contents["config"]["diffusion"]["timesteps_diff"] += 1
    write_tensors(path, tensors, contents)
    digests.add(load_weights(path).digest)
    assert len(digests) == 3


def test_weights_that_do_not_fit_are_named(path):
    weights, saved = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}, None
    for wrong, message in (
        ({}, None),
        ({"extra": torch.zeros(1)}, "'extra'"),
        ({"bias": None}, "'bias'"),
        ({"bias": torch.zeros(3)}, r"bias is torch.float32 \(3,\); the model has torch.float32 \(2,\)"),
        ({"bias": torch.zeros(2, dtype=torch.float64)}, "float64"),
    ):
        found = {f"model.{name}": t for name, t in {**weights, **wrong}.items() if t is not None}
        write_tensors(path, found, {"config": {}, "run": RUN, "scaler": {}})
        saved, model = load_weights(path), nn.Linear(3, 2, device="meta")
        if message:
            with pytest.raises(CheckpointError, match=message):
                load_into(model, saved)
        else:
            load_into(model, saved)
            assert same(dict(model.state_dict()), weights)


PEAK = """
import sys
from pathlib import Path
import torch
from functions.support.checkpoint import MOMENTS, TrainingState, save_checkpoint
kilobytes = lambda name: int(next(l for l in open("/proc/self/status") if l.startswith(name)).split()[1])
convolutions = lambda: torch.nn.Sequential(*(torch.nn.Conv2d(512, 512, 5) for _ in range(4)))
model, ema = (convolutions().to(memory_format=torch.channels_last) for _ in range(2))
optimizer = torch.optim.Adam(model.parameters())
for p in model.parameters():
    optimizer.state[p] = dict(zip(MOMENTS, (torch.ones(()), torch.ones_like(p), torch.ones_like(p))))
state = TrainingState(model, ema, optimizer, torch.amp.GradScaler("cpu", enabled=False))
before = kilobytes("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
save_checkpoint(Path(sys.argv[1]), {}, {}, state)
print(before, kilobytes("VmHWM"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_checkpoint_is_written_with_hardly_any_memory(path):
    """420 MB in channels_last, which the file is not in."""
    result = subprocess.run([sys.executable, "-c", PEAK, path], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    before, peak = (int(kilobytes) * 1024 for kilobytes in result.stdout.split())
    assert path.stat().st_size > 400e6
    assert peak - before < 80e6


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
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask  # others may read it as they may other files


def test_a_write_that_fails_leaves_the_old_file_and_no_other(path, monkeypatch):
    write_whole(path, lambda file: file.write(b"old"))

    def no_space(tensor):
        if tensor is last:
            raise OSError(28, "No space left on device")
        return original(tensor)

    original, (tensors, contents) = files.numbers, checkpoint_parts()
    last = list(tensors.values())[-1]
    monkeypatch.setattr(files, "checksum", lambda tensor: "")
    monkeypatch.setattr(files, "numbers", no_space)
    with pytest.raises(OSError, match="No space"):
        write_tensors(path, tensors, contents)
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]
