"""A disk that is too small ends in a sentence that says what is safe."""

import resource

import pytest

from functions.saved import run_folder
from tests.conftest import linux
from tests.forked import Program, train_script

pytestmark = pytest.mark.slow


def train_with_small_files():
    """Train where no file may have more than 0.5 MB, as if the disk were full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
    train_script()


@linux
def test_a_checkpoint_that_cannot_be_written(unfinished, tmp_path):
    """A checkpoint has about 1 MB, and the run was stopped after step 7."""
    last = run_folder.checkpoints_of(unfinished)[-1]
    whole = last.read_bytes()
    assert len(whole) > 700_000
    program = Program(tmp_path / "printed", "--resume", unfinished, act=train_with_small_files)
    assert program.wait() == 2

    assert "File too large" in program.printed
    advice = "Once you have fixed this, continue with: python train.py --resume "
    assert f"Last good checkpoint: {last}. {advice}{unfinished}" in program.printed
    assert "Traceback" not in program.printed
    assert run_folder.checkpoints_of(unfinished)[-1].read_bytes() == whole
    assert not list(unfinished.rglob(".*tmp*"))
