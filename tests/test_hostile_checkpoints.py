"""Checkpoints made to do harm, or that do not fit: refused by name, with nothing changed."""

import copy
import io
import struct
import time
import zipfile

import pytest
import torch

from functions.support.checkpoint import check_progress, load_checkpoint, restore, save_checkpoint
from functions.support.errors import CheckpointError
from tests.fuzz_kinds import checkpoint_parts, same, states, training_parts
from tests.fuzz_mutations import rezip

WEIGHT = "conv_in.weight"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "step-00000005.pt"


@pytest.fixture
def parts():
    return copy.deepcopy(checkpoint_parts(0))


def compress(whole):
    def change(info, data):
        info.compress_type = zipfile.ZIP_DEFLATED
        return data

    return rezip(whole, change)


def bomb(whole):
    """The zeros of 10 MB in 10 KB, which say so."""
    return rezip(
        whole, lambda info, data: data, lambda out: out.writestr("archive/data/999", bytes(10**7), zipfile.ZIP_DEFLATED)
    )


def overlapping(whole):
    """Every entry points to the largest member, as in the bombs whose sizes add up."""
    end = whole.rfind(b"PK\x05\x06")
    entry, spoilt = struct.unpack_from("<I", whole, end + 16)[0], bytearray(whole)
    pickle = max(zipfile.ZipFile(io.BytesIO(whole)).infolist(), key=lambda info: info.file_size)
    while spoilt[entry : entry + 4] == b"PK\x01\x02":
        struct.pack_into("<II", spoilt, entry + 20, pickle.file_size, pickle.file_size)
        entry += 46 + sum(struct.unpack_from("<HHH", whole, entry + 28))
    return bytes(spoilt)


def twice(name):
    return lambda whole: rezip(whole, lambda info, data: data, lambda out: out.writestr(name, b"other"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (compress, "unpack to more"),
        (bomb, "unpack to more"),
        (overlapping, "unpack to more"),
        (twice("archive/data/0"), "two members of one name"),
        (twice("archive/DATA.pkl"), "two members of one name"),
        (lambda whole: b"\x80\x02}q\x00." + whole, "does not begin"),  # to PyTorch, a pickle and no more
    ],
)
def test_archives_like_no_checkpoints_are_refused(path, parts, change, message):
    save_checkpoint(path, **parts)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (bytearray(8), "asks for '__builtin__ bytearray'"),  # which could ask for any size
        (torch.nn.Parameter(torch.ones(2)), "asks for 'torch._utils _rebuild_parameter'"),
        (torch.ones(2, 2).to_sparse(), "asks for 'torch._utils _rebuild_sparse"),
        (torch.ones(2, device="meta"), "asks for 'torch._utils _rebuild_meta"),
        (torch.tensor([1.0, float("nan")]), f"model.{WEIGHT} holds numbers that are not finite"),
        (torch.tensor([1.0, float("inf")]), f"model.{WEIGHT} holds numbers that are not finite"),
        (torch.ones(1).expand(10**9, 10**9), "not a plain tensor"),
        (b"bytes", "asks for '_codecs encode'"),
        ({1: 2}, "is a dict"),
        (2**70, "more than 64 bits"),
    ],
)
def test_values_like_no_checkpoints_are_named(path, parts, value, message):
    parts["model"][WEIGHT] = value
    save_checkpoint(path, **parts)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


def test_few_bytes_that_mean_many_values_are_refused_at_once(path, parts):
    laughs = []
    for _ in range(60):
        laughs = [laughs, laughs]
    parts["run"]["laughs"], start = laughs, time.monotonic()
    save_checkpoint(path, **parts)
    with pytest.raises(CheckpointError, match="holds more, or deeper"):
        load_checkpoint(path)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("change", [{"step": 91}, {"step": True}, {"total_steps": 10**9}, {"step": -1}])
def test_a_place_in_the_run_must_be_possible(path, parts, change):
    save_checkpoint(path, **{**parts, "run": {**parts["run"], **change}})
    with pytest.raises(CheckpointError, match=f"no proper '{next(iter(change))}'"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("window", {"loss_sum": 1.0}), ("window", {"loss_sum": 1.0, "steps": 2, "images": 3}), ("window", None),
        ("bad_numbers", {"step": 1, "skipped": 0, "in_a_row": 0, "longest": 0.0, "last": []}),
        ("bad_numbers", {"step": 1, "skipped": 0, "in_a_row": 0, "longest": 0, "last": [1.0, "2", 3.0]}),
        ("arithmetic", {"precision": "float32"}),
    ],
)  # fmt: skip
def test_what_a_training_goes_on_with_must_be_whole(path, parts, name, value):
    parts["run"][name] = value
    save_checkpoint(path, **parts)
    run = load_checkpoint(path)["run"]  # a sampler does without it
    with pytest.raises(CheckpointError, match=f"its '{name}' is not what this version writes"):
        check_progress(run, path)


def test_a_restored_training_is_the_saved_one(path, parts):
    parts["optimizer"]["param_groups"][0]["fused"] = None  # of the program, not of the run
    save_checkpoint(path, **parts)
    training = training_parts(seed=1)
    assert restore(load_checkpoint(path), path, *training) == 5
    assert training[2].param_groups[0]["fused"] is True
    expected = copy.deepcopy([parts["model"], parts["ema"], parts["optimizer"], parts["scaler"]])
    expected[2]["param_groups"] = training[2].state_dict()["param_groups"]
    assert same(states(*training), [dict(state) for state in expected])


def edit(*keys, value=None, remove=False):
    """A change deep in the parts of a checkpoint."""

    def change(parts):
        for key in keys[:-1]:
            parts = parts[key]
        if remove:
            del parts[keys[-1]]
        else:
            parts[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit("model", WEIGHT, value=torch.ones(2)), rf"{WEIGHT} is \(2,\) torch.float32; the model has"),
        (edit("model", WEIGHT, remove=True), f"weights are missing or unknown, '{WEIGHT}'"),
        (edit("ema", "odd", value=torch.ones(2)), "EMA weights are missing or unknown, 'odd'"),
        (edit("ema", value=None), "no EMA weights"),
        (edit("optimizer", "state", 0, remove=True), "3 moments of the optimiser .*time_embedding.linear_1.weight's"),
        (edit("optimizer", "state", 5000, value={"step": torch.ones(())}), 'moments .* "5000\'s step"'),
        (edit("optimizer", "state", 0, "exp_avg", value=torch.ones(2)), r"linear_1.weight's exp_avg is \(2,\)"),
        (edit("optimizer", "state", 0, "exp_avg", value=torch.ones(16, 4).double()), "exp_avg is .* torch.float64"),
        (edit("optimizer", "state", 0, "exp_avg_sq", value=-torch.ones(16, 4)), "exp_avg_sq is negative"),
        (edit("optimizer", "state", 0, "step", value=5), "step is int"),
        (edit("optimizer", "state", value=[]), "'state' is missing or malformed"),
        (edit("optimizer", "param_groups", value=[]), "'param_groups' are missing"),
        (edit("optimizer", "param_groups", 0, "betas", value=(0.5, 0.9)), r"'betas' is \(0.5, 0.9\); it must be"),
        (edit("optimizer", "param_groups", 0, "params", value=[1, 0]), "'params' is"),
        (edit("scaler", "scale", value=float("inf")), "'scale' is inf"),
        (edit("scaler", "growth_interval", remove=True), "'growth_interval' is None"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_changed(path, parts, change, message):
    change(parts)
    save_checkpoint(path, **parts)
    training = training_parts(seed=1)
    before = copy.deepcopy(states(*training))
    with pytest.raises(CheckpointError, match=message) as error:
        restore(load_checkpoint(path), path, *training)
    assert str(path) in str(error.value)
    assert same(states(*training), before)
