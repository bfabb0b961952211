"""What a training says before its first step: what the run is, and what it costs."""

from types import SimpleNamespace

import pytest

import train
from functions.training import cost, recorder
from functions.training.run import TrainingRun
from tests.conftest import call, train_tiny


@pytest.mark.slow
def test_a_dry_run_says_the_hours_of_the_steps_to_go(unfinished, pictures, monkeypatch, capsys):
    """A pass of 8 images is made to take an hour, so hours are the steps to go.

    There are 10 steps of 8 images, and for the same run after 7 of them there are 3. The 45
    training images make epochs of 5 steps, so 24 hours are 4.8 epochs.
    """

    def run_pass(denoiser, shape):
        assert shape == (8, 3, 16, 16)
        return 3600

    monkeypatch.setattr(cost, "run_pass", run_pass)
    train_tiny(pictures, unfinished.parent, "--dry-run", "--diffusion.snapshot-every", 4)
    call(train.main, "--resume", unfinished, "--dry-run", "--device", "cpu")

    # Nothing but the copy of the run is there.
    assert list(unfinished.parent.iterdir()) == [unfinished]
    new, resumed, _ = capsys.readouterr().out.split("nothing was started")
    assert "snapshots 3 of 0.00013 GB, 0.00039 GB in all" in " ".join(new.split())
    for printed, steps in ((new, 10), (resumed, 3)):
        description = " ".join(printed.split())
        assert "compute forward and backward of 8 on cpu" in description
        assert f"so the {steps} steps to go take about {steps:.1f} hours" in description
        assert "24 hours are 4.8 epochs: --diffusion.epochs 4" in description
        assert "sees 80 images, each training image 2 times" in description


def test_after_some_steps_a_training_says_how_long_it_takes(trained, monkeypatch, capsys):
    """Each of the 10 steps is made to take an hour.

    The first of its two validations says what has learned nothing.
    """
    draw = TrainingRun.draw
    clock = SimpleNamespace(monotonic=lambda: clock.now)

    def draw_for_an_hour(run, step):
        clock.now = 3600 * step
        return draw(run, step)

    monkeypatch.setattr(TrainingRun, "draw", draw_for_an_hour)
    monkeypatch.setattr(recorder, "time", clock)
    clock.now = 0
    monkeypatch.setattr(recorder, "ESTIMATE_AFTER", 4)
    trained()
    printed = capsys.readouterr().out
    assert "the 6 steps to go take about 6.0 hours" in printed
    assert printed.count("knows only the average image has a held-out loss of") == 1
