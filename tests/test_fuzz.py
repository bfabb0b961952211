"""Some hundred of the fuzzer's cases, and that it does find what it looks for. At scale: `python -m tests.fuzz`."""

import random
import time

import pytest
import torch

from functions.support import checkpoint, files
from functions.support.errors import CheckpointError
from tests import fuzz
from tests.fuzz_kinds import Case, Checkpoints, Fault, checkpoint_parts
from tests.fuzz_mutations import damage

COUNTS = {"checkpoint": 100, "config": 120, "image": 100, "zip": 100, "npz": 100}


@pytest.mark.parametrize("name", fuzz.KINDS)
def test_spoilt_files_give_a_clear_error_or_the_truth(name, tmp_path):
    kind = fuzz.KINDS[name](tmp_path)
    outcomes = [fuzz.run_case(kind, 0, number) for number in range(COUNTS[name])]
    assert sum(outcome.startswith("refused") for outcome in outcomes) > COUNTS[name] / 2


def test_a_case_is_a_function_of_seed_and_number():
    data = bytes(range(256)) * 8
    spoilt = [damage(data, data[::-1], random.Random(f"{seed} {number}")) for seed, number in ((1, 2), (1, 2), (1, 3))]
    assert spoilt[0] == spoilt[1] != spoilt[2]


def fault_of(kind, case_numbers=60):
    """The first fault among some cases."""
    for number in range(case_numbers):
        try:
            fuzz.run_case(kind, 0, number)
        except Fault as fault:
            return str(fault)
    return "none"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


def test_it_notices_a_reader_without_checksums(checkpoints, monkeypatch):
    def make(folder, rng):
        whole = bytearray(checkpoints.whole[0])
        weight = whole.index(checkpoint_parts()[0]["ema.conv_in.weight"].contiguous().numpy().tobytes())
        whole[weight] ^= 1  # the last bit of a number
        (folder / "a.safetensors").write_bytes(whole)
        return Case(folder / "a.safetensors")

    monkeypatch.setattr(checkpoints, "make", make)
    assert fuzz.run_case(checkpoints, 0, 0) == "refused: CheckpointError"
    monkeypatch.setattr(files, "checksum", lambda tensor: Anything())
    assert "WRONG RESULT" in fault_of(checkpoints, 1)


class Anything:
    """Equal to every checksum."""

    def __ne__(self, other):
        return False


def test_it_notices_an_error_that_is_let_through(checkpoints, monkeypatch):
    monkeypatch.setattr(files, "READ_ERRORS", ())
    assert "an undocumented" in fault_of(checkpoints)


def test_it_notices_a_half_restored_training(checkpoints, monkeypatch):
    def careless(state, file):
        with torch.no_grad():
            next(state.model.parameters()).add_(1)
        raise CheckpointError(f"{file.path}: does not fit")

    monkeypatch.setattr(checkpoint.TrainingState, "load", careless)
    monkeypatch.setattr(checkpoints, "make", lambda folder, rng: whole_case(checkpoints, folder))
    assert fault_of(checkpoints) == "a half-restored training"


def whole_case(checkpoints, folder):
    (folder / "a.safetensors").write_bytes(checkpoints.whole[0])
    return Case(folder / "a.safetensors")


@pytest.mark.parametrize(
    ("read", "found"),
    [
        (lambda case: time.sleep(3), "more than 1 seconds"),
        (lambda case: case.path.write_bytes(b"harmed"), "was changed"),
        (lambda case: case.path.with_name("other").touch(), "another lies beside it"),
        (lambda case: refuse("something is wrong"), "names neither file nor field"),
        (lambda case: refuse(f"{case.path}: {'x' * 10_000}"), "a message of"),
        (lambda case: refuse(f"{case.path}: no", MemoryError()), "out of memory"),
    ],
)
def test_it_notices_what_else_must_not_happen(checkpoints, monkeypatch, read, found):
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    monkeypatch.setattr(checkpoints, "read", read)
    monkeypatch.setattr(checkpoints, "judge", lambda case, result: "fine")
    assert found in fault_of(checkpoints, 1)


def refuse(message, cause=None):
    raise CheckpointError(message) from cause
