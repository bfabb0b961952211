"""Whoever changes this code sees the error of his own change, and not a sentence about a file."""

from functools import partial
from unittest import mock

import pytest
from PIL import ImageOps

import sample
from data.decode import parsing
from extras import diffusers_folder
from functions.saved.checkpoint import load_weights
from functions.support.command_line import run_script
from functions.training.resuming import explain_failed_writes
from models.unet import UNet
from tests.conftest import ROOT, call, refused

# It does what a misspelt attribute does.
misspelt = mock.Mock(side_effect=AttributeError("no_such_name"))


def test_a_typo_in_the_network_or_beside_diffusers(their_folder, tiny_run, tmp_path, monkeypatch):
    for place, name, flags in (
        (UNet, "__init__", [tiny_run]),
        (diffusers_folder, "our_schedule", [their_folder]),
        (diffusers_folder, "renamed", [tiny_run, "--export", tmp_path / "faces"]),
    ):
        with monkeypatch.context() as patch, pytest.raises(AttributeError, match="no_such_name"):
            patch.setattr(place, name, misspelt)
            run_script(partial(call, sample, *flags))


def test_a_call_that_a_library_does_not_know_is_no_damaged_file():
    """A line in tests/ stands for one in data/ or extras/."""
    with pytest.raises(TypeError, match="turn"), parsing("cannot be decoded"):
        ImageOps.exif_transpose(None, turn=1)


def test_the_cause_of_a_sentence_is_printed_if_asked_for(monkeypatch, capsys):
    """Else it is one line, as tests/test_bad_input.py finds."""
    monkeypatch.setenv("DDPM_TRACEBACK", "1")
    with pytest.raises(SystemExit, match="2"):
        run_script(lambda: load_weights(ROOT / "README.md"))
    *cause, sentence = capsys.readouterr().err.splitlines()
    assert "SafetensorError" in "".join(cause)
    assert sentence.startswith("error: ")


def test_a_failed_write_names_its_file_and_a_missing_file_is_none(tmp_path):
    with (
        refused("^other.csv cannot be written to: No space left"),
        explain_failed_writes(tmp_path, ""),
    ):
        raise OSError(28, "No space left on device", "other.csv")
    with pytest.raises(FileNotFoundError), explain_failed_writes(tmp_path, ""):
        (tmp_path / "no" / "metrics.csv").touch()
