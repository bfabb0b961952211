"""Checkpoints: what is written comes back bit for bit, in little memory, or the old file stays."""

import hashlib
import json
import math
import os
import sys
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import safetensors.torch
import torch
from torch import nn

from functions.optimizers import Adam, Muon
from functions.sampling.generation import rebuild
from functions.support import checkpoint, files
from functions.support.checkpoint import (
    TrainingState,
    export_weights,
    load_weights,
    save_checkpoint,
    verify_checkpoint,
)
from functions.support.errors import CheckpointError
from functions.support.files import TensorFile, write_atomically, write_tensors
from tests.conftest import CPU
from tests.forked import Program
from tests.peak_memory import at_most
from tests.spoilt_files import (
    checkpoint_parts,
    header_of,
    same,
    snapshot,
    stepped_state,
    training_state,
    with_header,
)

MUON = partial(Muon, precision=torch.float32)
CONFIG = {"diffusion": {"timesteps_diff": 10}, "model": {"base_dim": 8}}
RUN = {
    "experiment": "faces",
    "step": 5,
    "total_steps": 9,
    "nested": {"losses": [0.1, -1e-310, 2**60, None, "ü\n"]},
}


@pytest.mark.parametrize("kind", [Adam, MUON])
def test_a_training_comes_back_bit_for_bit(kind, path):
    """Weights, average, moments and steps, and the scaler come back; the layout stays.

    Both trainings step alike afterwards.
    """
    # It is changed here, so this test has one of its own.
    saved = stepped_state.__wrapped__(0, kind)
    other = training_state(1, kind)
    with torch.no_grad():
        # The average differs from the model, so that an exchange of the two is noticed.
        next(saved.ema_model.parameters()).sub_(1)
    assert saved.model.conv_in.weight.is_contiguous(memory_format=torch.channels_last)

    save_checkpoint(path, CONFIG, RUN, saved)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    file = verify_checkpoint(path)
    assert file.contents["config"] == CONFIG
    assert file.contents["run"] == RUN

    # Before the load the model, the average and the optimiser differ.
    assert not same(snapshot(other)[:3], snapshot(saved)[:3])
    other.load(file)
    assert same(snapshot(other), snapshot(saved))

    for parameter in other.model.parameters():
        moments = other.optimizer.state[parameter]
        # The one matrix is that of the time embedding.
        of_muon = kind is MUON and parameter.shape == (16, 16)
        assert set(moments) == ({"exp_avg"} if of_muon else {*checkpoint.MOMENTS})
        for name in moments.keys() - {"step"}:
            assert parameter.stride() == moments[name].stride()
    assert other.model.conv_in.weight.is_contiguous(memory_format=torch.channels_last)

    for state in (saved, other):
        for parameter in state.model.parameters():
            parameter.grad = torch.full_like(parameter, 0.1)
        state.optimizer.step()
    assert same(snapshot(other), snapshot(saved))

    # A run without EMA is another run, so it may not go on from this checkpoint.
    without_ema = TrainingState(other.model, None, other.optimizer, other.scaler)
    with pytest.raises(CheckpointError, match="unknown, such as 'ema"):
        without_ema.load(file)

    # Nor may a run with the other optimiser, which has other moments of the matrix.
    another = training_state(1, Adam if kind is MUON else MUON)
    with pytest.raises(
        CheckpointError, match="2 weights are missing or unknown, such as 'exp_avg_sq"
    ):
        another.load(file)


@pytest.mark.parametrize("dtype", files.TYPES)
def test_tensors_of_every_type_and_shape_come_back(path, dtype):
    tensors = {}
    for i, shape in enumerate([(), (0,), (3,), (2, 3, 4, 5), (1, 1, 7, 1)]):
        tensors[f"ü.{i}"] = (100 * torch.randn(shape)).to(dtype)

    # The file sorts its tensors by the width of their numbers, so it gets more than one width.
    for other in (torch.bfloat16, torch.float64):
        tensors[f"of {other.itemsize} bytes"] = torch.ones(3, dtype=other)

    # In these two, the order of the memory is not that of the shape.
    tensors["ü.3"] = tensors["ü.3"].to(memory_format=torch.channels_last)
    tensors["transposed"] = tensors["ü.3"].mT

    contents = {"not": [math.nan, math.inf]}
    write_tensors(path, tensors, contents)
    file = TensorFile(path)
    assert same(file.tensors(), tensors)
    assert same(file.contents, contents)


@pytest.mark.parametrize("dtype", files.TYPES)
def test_the_file_is_that_of_safetensors_with_right_checksums(path, tmp_path, dtype, monkeypatch):
    """The library writes the same header and numbers. Each tensor is read only once."""
    monkeypatch.setattr(files, "PIECE_SIZE", 100)
    read = Mock(wraps=files.byte_pieces)
    monkeypatch.setattr(files, "byte_pieces", read)
    # The first has many rows in a piece, the second is in channels_last and has one row in a piece.
    shapes = [(70, 2), (3, 2, 5, 5), (0, 3), (2, 0), ()]
    tensors = {f"ü{i}": (100 * torch.randn(shape)).to(dtype) for i, shape in enumerate(shapes)}
    tensors["ü1"] = tensors["ü1"].to(memory_format=torch.channels_last)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}

    write_tensors(path, tensors, {"step": 5})
    assert read.call_count == len(tensors)
    ours = path.read_bytes()
    header = json.loads(header_of(ours))
    metadata = header["__metadata__"]
    theirs = safetensors.torch.save(contiguous, metadata)
    assert header == json.loads(header_of(theirs))
    assert with_header(ours, b"") == with_header(theirs, b"")
    assert same(safetensors.torch.load(ours), tensors)

    checksums = {}
    for name, tensor in contiguous.items():
        total = hashlib.sha256(f"{dtype} {list(tensor.shape)}".encode())
        total.update(bytes(tensor.flatten().view(torch.uint8).tolist()))
        checksums[name] = total.hexdigest()
    assert metadata["contents"] == json.dumps({"step": 5, "checksums": checksums})
    assert metadata["sha256"] == hashlib.sha256(metadata["contents"].encode()).hexdigest()


def test_sampling_takes_the_average_if_there_is_one(path):
    tensors, contents = checkpoint_parts()
    without_average = {name: t for name, t in tensors.items() if "ema." not in name}

    cases = ((tensors, "ema.", "EMA"), (without_average, "model.", "raw"))
    for written, part, kind in cases:
        write_tensors(path, written, contents)
        saved = load_weights(path)

        weights = {n.removeprefix(part): t for n, t in tensors.items() if n.startswith(part)}
        assert same(saved.weights, weights)
        assert saved.kind == kind
        assert saved.config == contents["config"]
        assert saved.provenance == contents["run"]
        assert saved.model.image_shape == (3, 4, 4)
        assert str(saved) == f"{kind} weights after 5 of 90 steps, hash {saved.digest[:16]}"


def test_a_field_that_an_older_config_lacks_has_its_default(path):
    tensors, contents = checkpoint_parts()
    model = contents["config"]["model"]
    default = {name: model.pop(name) for name in ("channels", "dropout", "dialect")}
    write_tensors(path, tensors, contents)

    saved = load_weights(path)
    assert vars(saved.model) == {**model, **default, "dim_multiply": (1,), "transformer_layers": ()}
    assert same(dict(rebuild(saved, CPU).network.state_dict()), saved.weights)


def test_an_exported_file_is_a_part_of_the_checkpoint(path, tmp_path):
    tensors, contents = checkpoint_parts()
    write_tensors(path, tensors, contents)
    original = load_weights(path)
    exported = tmp_path / "faces.safetensors"

    export_weights(original, exported)
    again = load_weights(exported)
    assert again.digest == original.digest
    assert same(again.weights, original.weights)
    assert again.kind == original.kind
    assert again.config == original.config
    assert again.provenance == original.provenance
    average = {name: tensor for name, tensor in tensors.items() if name.startswith("ema.")}
    assert same(TensorFile(exported).tensors(), average)

    # Another weight and another config each give another digest.
    tensors["ema.conv_in.bias"][0] += 1
    write_tensors(path, tensors, contents)
    of_other_weight = load_weights(path).digest
    contents["config"]["diffusion"]["timesteps_diff"] += 1
    write_tensors(path, tensors, contents)
    of_other_config = load_weights(path).digest
    assert len({original.digest, of_other_weight, of_other_config}) == 3


def save_105_megabytes():
    """Save two networks and Adam's moments in channels_last, which is not the order of the file."""

    def network():
        return nn.Conv2d(512, 512, 5).to(memory_format=torch.channels_last)

    model = network()
    optimizer = Adam(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = TrainingState(model, network(), optimizer, scaler)
    with at_most(30):
        save_checkpoint(Path(sys.argv[1]), {}, {}, state)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_checkpoint_is_written_with_hardly_any_memory(path, tmp_path):
    program = Program(tmp_path / "printed", path, act=save_105_megabytes)

    assert program.wait() == 0, program.printed
    assert path.stat().st_size > 100e6


def test_the_whole_file_is_on_the_disk_before_it_has_its_name(path, monkeypatch):
    """Sizes are noted when files are flushed, and whether the name was there at that time."""
    flushed = {}
    original = os.fsync

    def fsync(descriptor):
        status = os.fstat(descriptor)
        flushed[status.st_ino] = (status.st_size, path.exists())
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_tensors(path, *checkpoint_parts())
    assert flushed[path.stat().st_ino] == (path.stat().st_size, False)

    if os.name == "posix":
        # The folder, which holds the name, is flushed when the name is there.
        assert flushed[path.parent.stat().st_ino][1]

        # Other users may read a checkpoint as they may read other files. Only a call that sets
        # the mask says what it was.
        mask = os.umask(0)
        os.umask(mask)
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_write_that_fails_leaves_the_old_file_and_no_other(path):
    def write_half(file):
        file.write(b"new")
        raise OSError(28, "No space left on device")

    write_atomically(path, lambda file: file.write(b"old"))
    with pytest.raises(OSError, match="No space") as error:
        write_atomically(path, write_half)

    assert error.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]
