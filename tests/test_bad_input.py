"""train.py and sample.py given what cannot work: one line that says why, exit code 2, and nothing written."""

import pytest
import torch

import sample
import train
from config import ConfigError
from functions.support.errors import CheckpointError, UserError
from tests.conftest import call, script


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--diffusion.dataset-name", "no/such/folder"], UserError, "no/such/folder"),
        (["--diffusion.dataset-name", "{empty}"], UserError, "no image"),
        (
            ["--diffusion.dataset-name", "{pictures}", "--diffusion.batch-size", "46"],
            ConfigError,
            "fewer than one step",
        ),
        (["--diffusion.learning-rate", "-1"], ConfigError, "learning_rate is -1.0"),
        (["--model.dim-multiply", "1,2,4"], ConfigError, "dim_multiply"),
        (["--resume", "{empty}"], CheckpointError, "no checkpoint in this folder"),
        (["--resume", "no/such/run"], UserError, "not a run folder"),
        (["--resume"], UserError, "no unfinished run"),
        (["--device", "gpu"], UserError, "'gpu'"),
    ],
)
def test_bad_input_to_train_is_refused_and_leaves_nothing(arguments, error, message, pictures, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").write_text("not an image")
    arguments = [text.format(empty=empty, pictures=pictures) for text in arguments]
    with pytest.raises(error, match=message):
        call(train.main, "faces", "--runs", tmp_path / "runs", *arguments)
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for CUDA where there is none")
@pytest.mark.parametrize("main", [train.main, sample.main])
def test_cuda_where_there_is_none(main, tiny_run):
    with pytest.raises(UserError, match="finds only"):
        call(main, "--runs", tiny_run.parent, "--device", "cuda")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("train.py", ["fases"], "there is no experiment 'fases'; there are faces, ffhq-run1"),
        ("train.py", ["--batchsize", "3"], "unrecognized arguments: --batchsize"),
        ("train.py", ["--diffusion.batch-size", "many"], "--diffusion.batch-size: invalid int value: 'many'"),
        ("sample.py", ["--n", "0"], "--n/-n: '0' is not an integer of at least 1"),
        ("sample.py", ["--eta", "2"], "--eta: '2' is not a number from 0 to 1"),
        ("sample.py", ["nothing.pt"], "nothing.pt: there is no such file"),
        ("sample.py", ["README.md"], "README.md: the file is truncated, damaged or not a checkpoint"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(name, arguments, message):
    result = script(name, *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_more_steps_than_timesteps_is_an_error_line(tiny_run):
    result = script("sample.py", tiny_run, "--steps", "101")
    assert result.returncode == 2
    assert "steps is 101; a model with 100 timesteps takes 1 to 100" in result.stderr
