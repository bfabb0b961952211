"""A disk or a memory that is too small ends in a sentence that says what is safe, and what fits."""

import resource
from pathlib import Path

import pytest

from functions.saved import run_folder
from tests.conftest import TINY, linux
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


def train_in_little_memory():
    """Train with 1 GB of address space beyond what is in use already."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 1_000_000_000
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    train_script()


@linux
def test_out_of_memory_is_a_sentence(pictures, tmp_path):
    """The network takes more memory than there is, even for a single image."""
    flags = ["faces", *TINY, "--model.base-dim", 1024, "--diffusion.batch-size", 24]
    flags += ["--runs", tmp_path / "runs", "--diffusion.dataset-name", pictures]
    program = Program(tmp_path / "printed", *flags, act=train_in_little_memory)

    assert program.wait() == 2
    assert "error: out of memory" in program.printed
    assert "use a smaller --model.base-dim" in program.printed
    # This flag is one of other scripts.
    assert "--batch-size" not in program.printed
    assert "Traceback" not in program.printed
