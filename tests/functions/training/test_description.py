"""What a training says before its first step."""

import train
from tests.conftest import call, train_tiny


def test_a_dry_run_describes_the_run_and_writes_nothing(unfinished, pictures, capsys):
    """There are 10 steps of 8 images, 5 of them in an epoch of 46, and here 7 are done."""
    train_tiny(pictures, unfinished.parent, "--dry-run")
    call(train, "--resume", unfinished, "--dry-run --device cpu")
    # Nothing but the copy of the run is there.
    assert list(unfinished.parent.iterdir()) == [unfinished]
    printed = capsys.readouterr().out
    assert "a hash of each name), such as 00033.png, 00043.png, 00048.png\n" in printed
    length = "  length     10 steps of 8 images: 2 epochs of 5 steps"
    assert printed.count(f"{length}\n") == printed.count(f"{length}; 7 steps are done\n") == 1
