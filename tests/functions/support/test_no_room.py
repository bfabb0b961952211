"""A disk or a memory that is too small: a sentence that says what is safe, and what would fit."""

import resource
import subprocess
import sys

import pytest

import train
from functions.support import run_folder
from functions.support.errors import UserError
from tests.conftest import ROOT, TINY, call, load_checkpoint, newest, script

FULL_DISK = """
mount -t tmpfs -o size=4m none {folder} || exit 99
cp -r {run} {folder}/
{python} {root}/train.py --resume {folder}/{name} --diffusion.epochs 20 --diffusion.keep-checkpoints 100
code=$?
cp -r {folder}/{name} {back}
exit $code
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a small file system of its own")
def test_a_full_disk(unfinished, tmp_path):
    """On a file system of 4 MB that fills up with checkpoints of 1.3 MB."""
    (tmp_path / "small").mkdir()
    commands = FULL_DISK.format(folder=tmp_path / "small", run=unfinished, name=unfinished.name, root=ROOT,
                                python=sys.executable, back=tmp_path / "back")  # fmt: skip
    result = subprocess.run(["unshare", "--map-root-user", "--mount", "sh", "-c", commands], cwd=ROOT, text=True,
                            capture_output=True, timeout=300, check=False)  # fmt: skip
    if result.returncode == 99 or "unshare" in result.stderr:
        pytest.skip("may not mount a file system here")
    assert result.returncode == 2
    last = run_folder.checkpoints_of(tmp_path / "back")[-1]
    assert "cannot be written to: No space left on device. Last good checkpoint: " in result.stderr
    assert f"checkpoints/{last.name}. When that is mended, go on with: python train.py --resume " in result.stderr
    assert "Traceback" not in result.stderr
    assert load_checkpoint(last)["run"]["step"] >= 7
    assert not list((tmp_path / "back").rglob(".*.tmp"))


@pytest.mark.skipif(sys.platform != "linux", reason="limits of the size of a file")
def test_a_checkpoint_beyond_a_quota(unfinished):
    """The system refuses files above 100 kB, as a quota does; the checkpoints are larger."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    before = {path: path.read_bytes() for path in run_folder.checkpoints_of(unfinished)}
    result = subprocess.run([sys.executable, ROOT / "train.py", "--resume", unfinished], preexec_fn=limit, text=True,
                            capture_output=True, timeout=300, check=False)  # fmt: skip
    assert result.returncode == 2
    assert f"cannot be written to: File too large. Last good checkpoint: {list(before)[-1]}" in result.stderr
    assert "Traceback" not in result.stderr
    assert {path: path.read_bytes() for path in run_folder.checkpoints_of(unfinished)} == before


def test_a_run_that_cannot_be_finished_now_is_not_lost(unfinished, monkeypatch):
    """An error in a sample grid: the checkpoint of the same step was written before it."""
    monkeypatch.setattr(
        "functions.training.book_keeping.save_grid", lambda *a: (_ for _ in ()).throw(OSError(5, "I/O error"))
    )
    with pytest.raises(UserError, match=r"I/O error\. Last good checkpoint: .*step-00000010\.safetensors"):
        call(train.main, "--resume", unfinished)
    assert newest(unfinished)["run"]["step"] == 10


LIMITED = """
import resource, sys, train
from pathlib import Path
from tests.conftest import call
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 1_000_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
with train.plain_errors():
    call(train.main, *sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of a process's memory")
def test_out_of_memory_is_a_sentence(pictures, tmp_path):
    """With 1 GB of address space to spare, and a network that takes more for a single image."""
    ended = script("-c", LIMITED, "faces", "--runs", tmp_path, "--diffusion.dataset-name", pictures, *TINY,
                   "--model.base-dim", 1024, "--diffusion.batch-size", 24)  # fmt: skip
    assert ended.returncode == 2
    assert "error: out of memory" in ended.stderr
    assert "Traceback" not in ended.stderr


NO_GRID = """
import runpy, sys
import functions.training.book_keeping

def no_room(*args, **options):
    from functions.support.errors import UserError

    raise UserError("no memory for a single image at a time on cpu")

functions.training.book_keeping.generate = no_room
sys.argv = ["train.py", *sys.argv[1:]]
runpy.run_path("train.py", run_name="__main__")
"""


def test_a_grid_that_does_not_fit_ends_training_with_a_sentence(pictures, tmp_path):
    ended = script("-c", NO_GRID, "faces", "--runs", tmp_path, "--diffusion.dataset-name", pictures, *TINY)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1] == "error: no memory for a single image at a time on cpu"
    assert "Traceback" not in ended.stderr
