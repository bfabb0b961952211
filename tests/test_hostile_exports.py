"""Exported files that are damaged or lie, and configs that would take all memory: refused by name, and before."""

import copy
import json
import time

import pytest
import torch

from functions.sampling.generation import rebuild
from functions.support.checkpoint import export_weights, load_weights
from functions.support.errors import CheckpointError
from models.unet import UNet
from tests.fuzz_kinds import checkpoint_parts

CPU = torch.device("cpu")
WEIGHT = "conv_in.weight"


@pytest.fixture
def parts():
    return copy.deepcopy(checkpoint_parts(0))


@pytest.fixture
def exported(tmp_path, parts):
    path = tmp_path / "faces.safetensors"
    export_weights(path, parts["ema"], parts["config"], {**parts["run"], "weights": "EMA"})
    return path


def with_header(path, change):
    """The file with another header of the right length."""
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + size :])


def test_a_flipped_bit_in_exported_weights_is_noticed(exported):
    whole = bytearray(exported.read_bytes())
    whole[-1] ^= 1
    exported.write_bytes(whole)
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        load_weights(exported)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header["__metadata__"].pop("sha256"), "exported before files had a checksum; export it again"),
        (lambda header: header["__metadata__"].update(config="{}"), "does not match its checksum"),
        (lambda header: header["__metadata__"].update(run="{}"), "does not match its checksum"),
        (lambda header: header[WEIGHT].update(dtype="I32"), "does not match its checksum"),
        (lambda header: header[WEIGHT].update(shape=header[WEIGHT]["shape"][::-1]), "does not match its checksum"),
        (lambda header: header.update(odd=header.pop(WEIGHT)), "does not match its checksum"),
        (lambda header: header["__metadata__"].update(format="other"), "not exported by this project"),
    ],
)
def test_a_changed_header_of_an_exported_file_is_noticed(exported, change, message):
    with_header(exported, lambda header: None)
    load_weights(exported)
    with_header(exported, change)
    with pytest.raises(CheckpointError, match=message) as error:
        load_weights(exported)
    assert str(exported) in str(error.value)


def test_exported_files_are_checked_as_checkpoints_are(exported, parts):
    run = {**parts["run"], "weights": "EMA"}
    bad = {**parts["ema"], WEIGHT: torch.full((2, 2), torch.nan)}
    for arguments, message in (
        ((bad, parts["config"], run), f"{WEIGHT} holds numbers that are not finite"),
        ((parts["ema"], parts["config"], parts["run"]), "whether its weights are EMA's"),
        ((parts["ema"], [], run), "malformed"),
        ((parts["ema"], parts["config"], {**run, "step": -1}), "no proper 'step'"),
    ):
        export_weights(exported, *arguments)
        with pytest.raises(CheckpointError, match=message):
            load_weights(exported)


def test_an_exported_config_too_deep_to_read_is_refused(exported, monkeypatch):
    monkeypatch.setattr("functions.support.export.json.dumps", lambda value: "[" * 10**5)
    export_weights(exported, {}, {}, {})
    with pytest.raises(CheckpointError, match="config does not read"):
        load_weights(exported)


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("diffusion", "timesteps_diff", 10**12, "timesteps_diff is above 1,000,000"),
        ("model", "base_dim", 10**9, "base_dim is above 16,384"),
        ("model", "image_size", 2**40, "image_size is above 16,384"),
        ("model", "dim_multiply", [1] * 10**5, "levels is above 15"),
        ("model", "norm_groups", 0, "ZeroDivisionError"),
        ("model", "base_dim", "8", "TypeError"),
        ("diffusion", "beta_end", float("nan"), "ValueError"),
    ],
)
def test_a_config_that_would_take_all_memory_is_refused_before(tmp_path, parts, part, field, value, message):
    parts["config"][part][field], start = value, time.monotonic()
    with pytest.raises(CheckpointError, match=message):
        rebuild(UNet, parts["ema"], parts["config"], tmp_path, CPU)
    assert time.monotonic() - start < 5
