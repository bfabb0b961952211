"""Checkpoints and run folders: what is written comes back, and what is damaged is named."""

import os
import pickle

import pytest
import torch
from torch import nn

from functions.support.checkpoint import (
    export_weights,
    load_checkpoint,
    load_into,
    load_weights,
    save_checkpoint,
    write_whole,
)
from functions.support.errors import CheckpointError


def parts(ema=True):
    weights = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor([1.0, -1.0])}
    return dict(
        config={"diffusion": {"timesteps_diff": 10}, "model": {"base_dim": 8}},
        run={"experiment": "faces", "step": 5, "total_steps": 9}, model=weights,
        ema={name: tensor + 1 for name, tensor in weights.items()} if ema else None,
        optimizer={"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}, scaler={},
    )  # fmt: skip


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(path, **parts())
    read = load_checkpoint(path)
    assert read["config"] == parts()["config"]
    assert read["run"] == parts()["run"]
    assert torch.equal(read["model"]["weight"], parts()["model"]["weight"])
    assert torch.equal(read["optimizer"]["state"][0]["exp_avg"], torch.ones(3))
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]


def test_sampling_takes_ema_weights_if_there_are_any(tmp_path):
    for ema, name in ((True, "EMA"), (False, "raw")):
        save_checkpoint(tmp_path / "a.pt", **parts(ema))
        weights, _, run = load_weights(tmp_path / "a.pt")
        assert run["weights"] == name
        assert torch.equal(weights["bias"], parts()["model"]["bias"] + (1 if ema else 0))


def test_exported_weights_read_as_the_checkpoint_does(tmp_path):
    save_checkpoint(tmp_path / "a.pt", **parts())
    original = load_weights(tmp_path / "a.pt")
    export_weights(tmp_path / "a.safetensors", *original)
    weights, config, run = load_weights(tmp_path / "a.safetensors")
    assert (config, run) == original[1:]
    assert weights.keys() == original[0].keys()
    assert all(torch.equal(weights[name], original[0][name]) for name in weights)


def test_an_exported_file_must_be_known_by_its_name(tmp_path):
    save_checkpoint(tmp_path / "a.pt", **parts())
    with pytest.raises(CheckpointError, match=r"must end in \.safetensors"):
        export_weights(load_weights(tmp_path / "a.pt"), tmp_path / "a.st")


class Bomb:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_would_run_code_does_not(tmp_path):
    for write in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        write({"format": Bomb(str(tmp_path / "exploded"))}, tmp_path / "bomb.pt")
        with pytest.raises(CheckpointError, match="not a checkpoint"):
            load_checkpoint(tmp_path / "bomb.pt")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_damaged_files_are_named(tmp_path, name):
    path = tmp_path / name
    save_checkpoint(tmp_path / "good.pt", **parts())
    export_weights(load_weights(tmp_path / "good.pt"), tmp_path / "good.safetensors")
    whole = (tmp_path / f"good{path.suffix}").read_bytes()
    with pytest.raises(CheckpointError, match="no such file"):
        load_weights(path)
    for content in (b"", whole[: len(whole) // 2], whole[:10], b"something else entirely", b"\x80\x02}q\x00."):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            load_weights(path)


def test_other_peoples_files_are_not_ours(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint of this project"):
        load_checkpoint(tmp_path / "other.pt")
    torch.save({"format": "ddpm-faces checkpoint 1", "config": {}}, tmp_path / "part.pt")
    with pytest.raises(CheckpointError, match="'run' is missing"):
        load_checkpoint(tmp_path / "part.pt")


@pytest.mark.parametrize(("name", "value"), [("experiment", None), ("step", "5"), ("total_steps", None)])
def test_a_checkpoint_must_say_where_its_run_stood(tmp_path, name, value):
    run = {**parts()["run"], name: value}
    save_checkpoint(tmp_path / "a.pt", **{**parts(), "run": run})
    export_weights(tmp_path / "a.safetensors", parts()["model"], parts()["config"], run)
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(CheckpointError, match=f"no proper '{name}'"):
            load_weights(path)


def test_weights_that_do_not_fit_are_named(tmp_path):
    model, good = nn.Linear(3, 2), parts()["model"]
    load_into(model, good, tmp_path)
    assert torch.equal(model.weight, good["weight"])
    for wrong, message in (
        ({**good, "extra": torch.zeros(1)}, "'extra'"),
        ({"weight": good["weight"]}, "'bias'"),
        ({**good, "bias": torch.zeros(3)}, r"bias is \(3,\)"),
        ({**good, "bias": torch.zeros(2, dtype=torch.float64)}, "float64"),
        ({**good, "bias": "text"}, "bias is str"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_into(model, wrong, tmp_path)


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.txt"
    write_whole(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half of the n")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_whole(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
