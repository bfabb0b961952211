"""Scripts that are given what cannot work print one line that says why, and end with status 2.

They write nothing.
"""

import io
import os
import runpy
import sys

import pytest
import torch

from functions.support.command_line import exit_on_user_error
from functions.support.errors import UserError
from tests.conftest import ROOT

WITHOUT_CUDA = pytest.mark.skipif(
    torch.cuda.is_available(), reason="asks for CUDA where there is none"
)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("train.py", ["--diffusion.dataset-name", "no/such/folder"], "no/such/folder"),
        ("train.py", ["--diffusion.dataset-name", "{empty}"], "no image"),
        (
            "train.py",
            ["--diffusion.dataset-name", "{pictures}", "--diffusion.batch-size", "46"],
            "fewer than one step",
        ),
        ("train.py", ["--diffusion.learning-rate", "-1"], "learning_rate is -1.0"),
        ("train.py", ["--model.dim-multiply", "1,2,4"], "dim_multiply"),
        ("train.py", ["--resume", "{empty}"], "no checkpoint in this folder"),
        ("train.py", ["--resume", "no/such/run"], "not a run folder"),
        ("train.py", ["--resume"], "no unfinished run"),
        ("train.py", ["--device", "gpu"], "'gpu'"),
        (
            "train.py",
            ["fases"],
            "there is no experiment 'fases'; choose from faces-quick, faces, faces-v, mnist",
        ),
        (
            "train.py",
            ["--diffusion.batch-size", "many"],
            "--diffusion.batch-size: invalid int value: 'many'",
        ),
        ("sample.py", ["--n", "0"], "--n/-n: '0' is not an integer of at least 1"),
        ("sample.py", ["--eta", "2"], "--eta: '2' is not a number from 0 to 1"),
        ("sample.py", ["--sampler", "euler"], "invalid choice: 'euler' (choose from"),
        (
            "sample.py",
            ["--sampler", "ddim", "--variance", "large"],
            "--variance: the options of --sampler ddim are --spacing and --eta",
        ),
        ("sample.py", ["--n", "101"], "a grid shows 100 images at most; for 101 add --individual"),
        ("sample.py", ["--inpaint", "a.png"], "a command of its own: python edit.py inpaint A"),
        (
            "edit.py",
            ["interpolate", "1", "2", "--depths", "0.5,2"],
            "'2' is not a number from 0 to 1",
        ),
        ("sample.py", ["nothing.pt"], "nothing.pt: there is no such file"),
        (
            "sample.py",
            [str(ROOT / "README.md")],
            "README.md: the file is truncated, damaged or not a checkpoint",
        ),
        pytest.param("train.py", ["--device", "cuda"], "finds only", marks=WITHOUT_CUDA),
        pytest.param("sample.py", ["--device", "cuda"], "finds only", marks=WITHOUT_CUDA),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    name, arguments, message, pictures, tmp_path, monkeypatch, capsys
):
    # The texts {empty} and {pictures} in an argument stand for a folder without and with images.
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").write_text("not an image")
    arguments = [text.format(empty=empty, pictures=pictures) for text in arguments]
    monkeypatch.setattr(sys, "argv", [name, *arguments, "--runs", str(tmp_path / "runs")])

    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / name), run_name="__main__")

    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert message in printed.err
    assert printed.err.count("\n") == 1
    # By then train.py may have said what it is doing; sample.py has not.
    assert name == "train.py" or not printed.out
    assert not (tmp_path / "runs").exists()


def test_a_name_that_is_not_utf_8_is_printed(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stdout)
    with exit_on_user_error():
        print(os.fsdecode(b"faces\xff"), flush=True)
    assert stdout.buffer.getvalue() == b"faces\\udcff\n"


def test_lack_of_memory_is_one_line(capsys):
    with pytest.raises(SystemExit, match="2"), exit_on_user_error():
        raise torch.AcceleratorError("CUDA error: out of memory\nmore")
    error = capsys.readouterr().err
    assert "out of memory" in error
    assert error.count("\n") == 1


def test_another_error_of_cuda_keeps_its_traceback():
    message = "an illegal memory access was encountered"
    with pytest.raises(torch.AcceleratorError, match=message), exit_on_user_error():
        raise torch.AcceleratorError(f"CUDA error: {message}")


def test_an_error_does_not_control_the_terminal(capsys):
    with pytest.raises(SystemExit), exit_on_user_error():
        raise UserError("\x1b[2J: no such file\nand more")
    assert capsys.readouterr().err == "error: \\x1b[2J: no such file\nand more\n"
