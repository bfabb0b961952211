"""What a training says before its first step: what the run is, and what it costs."""

import math
import time
from types import SimpleNamespace

import pytest
import torch

import train
from functions.training import cost
from functions.training.run import TrainingRun
from tests.conftest import call, train_tiny


@pytest.mark.slow
def test_a_dry_run_says_the_hours_of_the_steps_to_go(unfinished, pictures, monkeypatch, capsys):
    """A pass of 8 images is made to take an hour, so hours are the steps to go.

    There are 10 steps of 8 images, and for the same run after 7 of them there are 3. The 46
    training images make epochs of 5 steps, so 24 hours are 4.8 epochs.
    """

    def run_pass(denoiser, shape):
        assert shape == (8, 3, 16, 16)
        return 3600

    monkeypatch.setattr(cost, "run_pass", run_pass)
    # The optimiser takes no time.
    monkeypatch.setattr(cost, "time", SimpleNamespace(perf_counter=lambda: 0))
    train_tiny(pictures, unfinished.parent, "--dry-run", "--diffusion.snapshot-every", 4)
    call(train.main, "--resume", unfinished, "--dry-run", "--device", "cpu")

    # Nothing but the copy of the run is there.
    assert list(unfinished.parent.iterdir()) == [unfinished]
    new, resumed, _ = capsys.readouterr().out.split("nothing was started")
    assert "snapshots 3 of 0.00013 GB, 0.00039 GB in all" in " ".join(new.split())
    assert "a hash of each name), such as 00033.png, 00043.png, 00048.png\n" in new
    for printed, steps in ((new, 10), (resumed, 3)):
        description = " ".join(printed.split())
        assert "compute forward and backward of 8 on cpu" in description
        assert f"so the {steps} steps to go take about {steps:.1f} hours" in description
        assert "24 hours are 4.8 epochs: --diffusion.epochs 4" in description
        assert "sees 80 images, each training image 2 times" in description

    # The second number is neither above the first nor above the limit.
    for epochs, advice in (
        (2223.96, "2,223.9 epochs: --diffusion.epochs 2223"),
        (5655931.96, "5,655,931.9 epochs: --diffusion.epochs 1000000"),
    ):
        seconds = 24 * 3600 / (5 * epochs)
        monkeypatch.setattr(cost, "run_pass", lambda *a, seconds=seconds: seconds)
        train_tiny(pictures, unfinished.parent, "--dry-run")
        assert f"24 hours are {advice}\n" in capsys.readouterr().out
    for seconds, text in ((0.042, "0.042 seconds"), (90, "1.5 minutes"), (9000, "2.5 hours")):
        assert cost.duration(seconds) == text


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ("--diffusion.rescale-betas false", "set rescale_betas = True or use 1000 timesteps"),
        ("--diffusion.timesteps-diff 1000 --diffusion.beta-end 0.002", "use a beta_end of 0.02"),
        (
            "--diffusion.rescale-betas false --diffusion.beta-end 0.002",
            "set rescale_betas = True or use 1000 timesteps; use a beta_end of 0.02",
        ),
    ],
)
def test_a_schedule_that_ends_too_early_is_warned_of_with_what_helps(
    changes, advice, trained, capsys
):
    trained("--dry-run", *changes.split())
    said = "x_T still carries the image, but sampling starts from pure noise; "
    assert f"{said}{advice}\n" in capsys.readouterr().out


def test_a_warm_up_or_an_average_longer_than_the_run_is_warned_of(trained, capsys):
    """The run has 10 steps, so a warm-up of 200 reaches 10 / 201 of the rate."""
    trained("--dry-run", "--diffusion.warmup-steps", 200, "--diffusion.ema-decay", 0.99)
    printed = capsys.readouterr().out
    assert "warmup_steps is 200, and the run has 10 steps: the learning rate rises to 5%" in printed
    assert "ema_decay = 0.99 is for an average over 100 steps, and the run has 10 " in printed

    # A length of 10 steps is that of the run.
    trained("--dry-run", "--diffusion.warmup-steps", 9, "--diffusion.ema-decay", 0.9)
    assert "warning" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "hours", "times"), [(4, math.inf, 1), (20, 2.5, 1), (10, math.inf, 0)]
)
def test_after_some_steps_a_training_says_how_long_it_takes(
    steps, hours, times, trained, monkeypatch, capsys
):
    """Each of the 10 steps is made to take an hour.

    After the last step there is nothing to estimate. The single thread has nothing to wait for.
    """
    draw = TrainingRun.draw
    clock = SimpleNamespace(monotonic=lambda: clock.now)

    def draw_for_an_hour(run, step):
        clock.now = 3600 * step
        return draw(run, step)

    monkeypatch.setattr(TrainingRun, "draw", draw_for_an_hour)
    monkeypatch.setattr(cost, "time", clock)
    monkeypatch.setattr(cost, "seconds_without_core", lambda: clock.now)
    clock.now = 0
    monkeypatch.setattr(cost, "FIRST_STEPS", steps)
    monkeypatch.setattr(cost, "FIRST_SECONDS", 3600 * hours)
    trained()
    printed = capsys.readouterr().out
    assert printed.count("the 6 steps to go take about 6.0 hours") == times
    assert printed.count("steps to go") == times
    assert "keep the cores busy" not in printed


@pytest.mark.slow
@pytest.mark.parametrize(("share", "warns"), [(0.05, False), (0.35, True)])
def test_busy_cores_are_named_with_what_to_do(share, warns, trained, monkeypatch, capsys):
    """The two threads wait for cores for this share of the time."""
    monkeypatch.setattr(cost, "FIRST_STEPS", 3)
    start = time.monotonic()
    monkeypatch.setattr(
        cost, "seconds_without_core", lambda: 2 * share * (time.monotonic() - start)
    )
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    run = trained()
    printed = capsys.readouterr().out
    advice = f"continue with OMP_NUM_THREADS=1 python train.py --resume {run}"
    assert (advice in printed) == warns
