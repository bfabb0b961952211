"""What a training says before its first step: what the run is, and what it costs."""

import pytest

import train
from functions.training import cost
from tests.conftest import call, train_tiny


@pytest.mark.slow
def test_a_dry_run_says_the_hours_of_the_steps_to_go(unfinished, pictures, monkeypatch, capsys):
    """A pass of 8 images is made to take an hour, so hours are the steps to go.

    There are 10 steps of 8 images, and for the same run after 7 of them there are 3.
    """

    def run_pass(denoiser, shape):
        assert shape == (8, 3, 16, 16)
        return 3600

    monkeypatch.setattr(cost, "run_pass", run_pass)
    train_tiny(pictures, unfinished.parent, "--dry-run")
    call(train.main, "--resume", unfinished, "--dry-run", "--device", "cpu")

    # Nothing but the copy of the run is there.
    assert list(unfinished.parent.iterdir()) == [unfinished]
    new, resumed, _ = capsys.readouterr().out.split("nothing was started")
    for printed, steps in ((new, 10), (resumed, 3)):
        description = " ".join(printed.split())
        assert "compute forward and backward of 8 on cpu" in description
        assert f"so the {steps} steps to go take about {steps:.2f} hours" in description
