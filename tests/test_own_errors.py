"""Whoever changes this code sees the error of his own change, and not a sentence about a file."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import sample
from data import decode, sources
from functions.saved import diffusers_folder
from functions.support.command_line import run_script
from functions.support.errors import CheckpointError, UserError
from functions.training.stopping import explain_failed_writes
from models.unet import UNet
from tests.conftest import call, refused
from tests.data.packing import IMAGES, encoded


def misspell(*args, **options):
    """Do what a misspelt attribute does."""
    sys.no_such_name  # noqa: B018


def test_a_typo_in_the_network_or_beside_diffusers(their_folder, tiny_run, tmp_path, monkeypatch):
    for place, name, flags in (
        (UNet, "__init__", [tiny_run]),
        (diffusers_folder, "our_schedule", [their_folder]),
        (diffusers_folder, "copy_weights", [tiny_run, "--export", tmp_path / "faces"]),
    ):
        with monkeypatch.context() as patch, pytest.raises(AttributeError, match="no_such_name"):
            patch.setattr(place, name, misspell)
            call(sample, *flags)


def planted(module, right, wrong):
    """Return what a module has with another text in one place, as after a slip of an editor."""
    source = Path(module.__file__).read_text()
    assert source.count(right) == 1
    namespace = {"__name__": module.__name__, "__file__": module.__file__}
    exec(compile(source.replace(right, wrong), module.__file__, "exec"), namespace)
    return SimpleNamespace(**namespace)


def decode_a_png(ours, folder):
    return ours.open_image(encoded(IMAGES[0]))


def read_digits(ours, folder):
    return ours.read_torchvision_set("MNIST", folder)


@pytest.mark.parametrize(
    ("module", "right", "wrong", "call", "error"),
    [
        (decode, "transpose(image)", "transpose(image, turn=1)", decode_a_png, TypeError),
        (sources, "download=download)", "fetch=download)", read_digits, TypeError),
    ],
)
def test_own_error_planted_beside_a_library_is_no_sentence(
    module, right, wrong, call, error, tmp_path
):
    with pytest.raises(error) as raised:
        call(planted(module, right, wrong), tmp_path)
    assert not isinstance(raised.value, UserError)


def refuse_a_file():
    try:
        int("x")
    except ValueError as error:
        raise CheckpointError("the file is damaged") from error


def test_the_cause_of_a_sentence_is_printed_if_asked_for(monkeypatch, capsys):
    """Else it is one line, as tests/test_bad_input.py finds."""
    monkeypatch.setenv("DDPM_TRACEBACK", "1")
    with pytest.raises(SystemExit, match="2"):
        run_script(refuse_a_file)
    printed = capsys.readouterr().err
    assert "ValueError: invalid literal" in printed
    assert printed.endswith("error: the file is damaged\n")


def test_only_memory_is_called_memory():
    """oneDNN has this message for shapes that it does not compute, too."""

    def fail():
        raise RuntimeError("could not create a primitive descriptor for a convolution")

    with pytest.raises(RuntimeError, match="primitive"):
        run_script(fail)


def test_a_failed_write_names_its_file(tmp_path):
    with (
        refused("^other/metrics.csv cannot be written to: No space left", UserError),
        explain_failed_writes(tmp_path, ""),
    ):
        raise OSError(28, "No space left on device", "other/metrics.csv")


def test_a_file_that_is_missing_is_no_failed_write(tmp_path):
    with pytest.raises(FileNotFoundError), explain_failed_writes(tmp_path, ""):
        (tmp_path / "no" / "metrics.csv").touch()
