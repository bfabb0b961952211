"""What a training says before its first step: what the run is, and what it costs."""

from types import SimpleNamespace

import train
from tests.conftest import call, train_tiny


def test_a_dry_run_says_the_hours_of_the_steps_to_go(unfinished, pictures, monkeypatch, capsys):
    """A pass of 8 images is made to take an hour, so hours are the steps to go.

    There are 10 steps of 8 images, and for the same run after 7 of them there are 3. The 46
    training images make epochs of 5 steps, so 24 hours are 4.8 epochs.
    """

    def run_pass(denoiser, x_0, t, noise):
        assert x_0.shape == noise.shape == (8, 3, 16, 16)
        return 3600

    monkeypatch.setattr("functions.training.description.run_pass", run_pass)
    # The optimiser takes no time.
    monkeypatch.setattr(
        "functions.training.description.time", SimpleNamespace(perf_counter=lambda: 0)
    )
    train_tiny(pictures, unfinished.parent, "--dry-run")
    call(train, "--resume", unfinished, "--dry-run --device cpu")

    # Nothing but the copy of the run is there.
    assert list(unfinished.parent.iterdir()) == [unfinished]
    new, resumed, _ = capsys.readouterr().out.split("nothing was started")
    assert "a hash of each name), such as 00033.png, 00043.png, 00048.png\n" in new
    for printed, hours in ((new, 10), (resumed, 3)):
        description = " ".join(printed.split())
        assert "compute forward and backward of 8 on cpu: 3.6e+03 s" in description
        assert f"so the steps to go take about {hours}:00:00 (h:mm:ss)" in description
        assert "24 hours are 4.8 epochs" in description


def test_a_schedule_that_leaves_the_image_in_x_T_is_warned_of(trained, capsys):
    trained("--dry-run --diffusion.rescale-betas false")
    printed = capsys.readouterr().out
    assert "starts from pure noise; set rescale_betas = True and beta_end = 0.02\n" in printed
    trained("--dry-run")
    assert "warning" not in capsys.readouterr().out
