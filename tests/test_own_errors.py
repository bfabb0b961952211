"""Whoever changes this code sees the error of his own change, and not a sentence about a file."""

import sys

import pytest

import sample
from functions.saved import checkpoint, diffusers_folder
from functions.support.command_line import run_script
from functions.support.errors import CheckpointError, UserError
from functions.training.stopping import explain_failed_writes
from models.unet import UNet
from tests.conftest import call, refused


def misspell(*args, **options):
    """Do what a misspelt attribute does."""
    sys.no_such_name  # noqa: B018


@pytest.mark.parametrize(
    ("place", "name"), [(UNet, "__init__"), (checkpoint, "sha256"), (checkpoint, "digest_of")]
)
def test_a_typo_in_the_network_or_in_a_checkpoint(place, name, tiny_run, monkeypatch):
    monkeypatch.setattr(place, name, misspell)
    with pytest.raises(AttributeError, match="no_such_name"):
        call(sample, tiny_run)


def test_a_typo_where_a_folder_of_diffusers_is_read_or_written(
    their_folder, tiny_run, tmp_path, monkeypatch
):
    for name, flags in (
        ("our_schedule", [their_folder]),
        ("copy_weights", [tiny_run, "--export", tmp_path / "faces"]),
    ):
        monkeypatch.setattr(diffusers_folder, name, misspell)
        with pytest.raises(AttributeError, match="no_such_name"):
            call(sample, *flags)


def refuse_a_file():
    try:
        int("x")
    except ValueError as error:
        raise CheckpointError("the file is damaged") from error


@pytest.mark.parametrize("asked", [False, True])
def test_the_cause_of_a_sentence_is_printed_if_asked_for(asked, monkeypatch, capsys):
    if asked:
        monkeypatch.setenv("DDPM_TRACEBACK", "1")
    with pytest.raises(SystemExit, match="2"):
        run_script(refuse_a_file)
    printed = capsys.readouterr().err
    assert printed.endswith("error: the file is damaged\n")
    assert ("ValueError: invalid literal" in printed) == asked
    assert ("Traceback" in printed) == asked


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
