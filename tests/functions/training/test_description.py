"""What a training says before its first step."""

from functions.training.opening import open_run
from tests.conftest import TINY, words


def test_a_run_is_described_before_anything_is_written(unfinished, pictures):
    """There are 10 steps of 8 images, 5 of them in an epoch of 46, and here 7 are done."""
    before = {path: path.stat().st_mtime_ns for path in unfinished.rglob("*") if path.is_file()}
    new = ["--runs", unfinished.parent, "--diffusion.dataset-name", pictures, TINY]
    for flags, done in ((new, ""), (["--resume", unfinished], "; 7 steps are done")):
        with open_run(words(*flags), "") as run:
            said = run.describe()
        assert "a hash of each name), such as 00033.png, 00043.png, 00048.png\n" in said
        assert f"  length     10 steps of 8 images: 2 epochs of 5 steps{done}\n" in said
    # Nothing but the copy of the run is there, and what it holds is as it was.
    assert list(unfinished.parent.iterdir()) == [unfinished]
    after = {path: path.stat().st_mtime_ns for path in unfinished.rglob("*") if path.is_file()}
    assert {path: after[path] for path in before} == before
