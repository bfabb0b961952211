"""A disk or a memory that is too small ends in a sentence that says what is safe, and what fits."""

import resource
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

import train
from functions.support import run_folder
from functions.support.errors import UserError
from tests.conftest import ROOT, TINY, call, load_checkpoint, newest
from tests.forked import Program, train_script

pytestmark = pytest.mark.slow
linux = pytest.mark.skipif(
    sys.platform != "linux", reason="a small file system, and limits of a process"
)
# A small file system is mounted, a run is copied there and resumed, and its folder is copied back.
FULL_DISK = """
mount -t tmpfs -o size=4m none {folder} || exit 99
cp -r {run} {folder}/
{python} train.py --resume {folder}/{name} --diffusion.epochs 20 --diffusion.keep-checkpoints 100 \
    --diffusion.sample-every 1000
code=$?
cp -r {folder}/{name} {back}
exit $code
"""


@linux
def test_a_full_disk(unfinished, tmp_path):
    """A file system of 4 MB fills up with checkpoints of 1.3 MB each."""
    small = tmp_path / "small"
    small.mkdir()
    commands = FULL_DISK.format(
        folder=small,
        run=unfinished,
        name=unfinished.name,
        python=sys.executable,
        back=tmp_path / "back",
    )
    inside = ["unshare", "--map-root-user", "--mount", "sh", "-c", commands]
    try:
        result = subprocess.run(
            inside, cwd=ROOT, text=True, capture_output=True, timeout=300, check=False
        )
    except FileNotFoundError:
        pytest.skip("there is no unshare here")
    if result.returncode == 99 or "unshare" in result.stderr:
        pytest.skip("may not mount a file system here")
    assert result.returncode == 2

    last = run_folder.checkpoints_of(tmp_path / "back")[-1]
    said = result.stderr.splitlines()[-1]
    assert "No space left on device" in said
    advice = "Once you have fixed this, continue with: python train.py --resume "
    assert f"checkpoints/{last.name}. {advice}" in said
    assert "Traceback" not in result.stderr

    # The run was stopped after step 7, and lost nothing.
    assert load_checkpoint(last)["run"]["step"] >= 7
    assert not list((tmp_path / "back").rglob(".*.tmp"))


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
    assert "Traceback" not in program.printed


def test_a_run_whose_last_grid_fails_is_not_lost(unfinished, monkeypatch):
    """The checkpoint of the same step is written before its grid."""
    fails = Mock(side_effect=OSError(5, "I/O error"))
    monkeypatch.setattr("functions.training.recorder.save_grid", fails)

    message = r"I/O error\. Last good checkpoint: .*step-00000010\.safetensors"
    with pytest.raises(UserError, match=message):
        call(train.main, "--resume", unfinished)
    assert newest(unfinished)["run"]["step"] == 10
