"""What a training says before its first step: what the run is, and what it costs."""

import pytest

import train
from functions.training import cost
from tests.conftest import call, train_tiny


@pytest.mark.slow
@pytest.mark.parametrize(("seconds", "timed"), [(0.5, 8), (450, 1)])
def test_a_dry_run_says_the_hours_of_the_steps_to_go(
    seconds, timed, unfinished, pictures, monkeypatch, capsys
):
    """A step is made to take an hour, so hours are the steps to go.

    There are 10 steps of 8 images, and for the same run after 7 of them there are 3. An image takes
    450 s. The pass of one image is timed if it takes long, else the best of whole passes.
    """

    def run_pass(denoiser, shape):
        return seconds if shape[0] == 1 else 450 * 8

    monkeypatch.setattr(cost, "run_pass", run_pass)
    train_tiny(pictures, unfinished.parent, "--dry-run")
    call(train.main, "--resume", unfinished, "--dry-run", "--device", "cpu")

    # Nothing but the copy of the run is there.
    assert list(unfinished.parent.iterdir()) == [unfinished]
    new, resumed, _ = capsys.readouterr().out.split("nothing was started")
    for printed, steps in ((new, 10), (resumed, 3)):
        description = " ".join(printed.split())
        assert f"compute forward and backward of {timed} on cpu" in description
        assert f"so the {steps} steps to go take about {steps:.2f} hours" in description
