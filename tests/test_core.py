"""The core alone, without extras/, edit.py, evaluate.py and demo.py, trains and draws."""

import shutil
from pathlib import Path

import pytest

from tests.conftest import ROOT, TINY, only_in, pixels_of, script
from tests.test_imports import core

PEOPLE = "sample.py pretrained/people.toml -n 1 --steps 2 --device cpu"


@pytest.fixture
def alone(tmp_path):
    """Return a folder of the core, with the embedded images and the models of the box."""
    packages = {f"{Path(file).parent}/__init__.py" for file in core()}
    present = {file for file in packages if (ROOT / file).is_file()}
    for file in core() | present | {"data/emoji_faces.zip"}:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, tmp_path / file)
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    return tmp_path


@pytest.mark.slow
def test_the_core_alone_trains_resumes_and_draws(alone):
    def called(*command):
        ended = script(*command, cwd=alone)
        assert ended.returncode == 0, ended.stderr

    called("train.py", TINY, "--diffusion.batch-size 256 --diffusion.epochs 1")
    run = only_in(alone / "runs")
    before = {*(run / "checkpoints").iterdir()}
    called("train.py --resume", run, "--diffusion.epochs 2")
    assert {*(run / "checkpoints").iterdir()} - before
    for command in (["sample.py", run, "-n 1 --steps 2"], [PEOPLE]):
        called(*command, "--out drawn")
        assert pixels_of(alone / "drawn" / "grid.png").std() > 10
        shutil.rmtree(alone / "drawn")

    # What is missing is named.
    (alone / "a.parquet").touch()
    for command, what in (
        ("sample.py google/ddpm-cifar10-32", "a model of diffusers"),
        ("train.py --diffusion.dataset-name a.parquet", "a.parquet"),
        ("train.py --diffusion.dataset-name MNIST", "MNIST"),
    ):
        ended = script(command, cwd=alone)
        sentence = f"error: {what} needs extras of this project, which is not here\n"
        assert (ended.returncode, ended.stderr) == (2, sentence)
