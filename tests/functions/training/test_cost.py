"""What a training says before its first step: what the run is, and what it costs."""

import shlex

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
    train_tiny(pictures, unfinished.parent, "--dry-run", "--diffusion.snapshot-every", 4)
    call(train.main, "--resume", unfinished, "--dry-run", "--device", "cpu")

    new, resumed, _ = capsys.readouterr().out.split("nothing was started")
    # The network has 64,483 parameters, and each takes 2 bytes.
    assert "snapshots  3 of 0.1 MB each\n" in new
    for printed, steps in ((new, 10), (resumed, 3)):
        description = " ".join(printed.split())
        assert f"compute forward and backward of {timed} on cpu" in description
        assert f"so the {steps} steps to go take about {steps:.2f} hours" in description


@pytest.mark.slow
def test_ffhq_run1_is_ready_at_its_real_size(pictures, tmp_path, monkeypatch, capsys):
    """The network and the config are the real ones, on few pictures. Nothing is started.

    The batch is smaller than the real one, so that 45 training pictures are enough for it.
    """
    # One image seems to take long, so no pass of a whole batch is timed.
    run_pass = cost.run_pass
    monkeypatch.setattr(cost, "run_pass", lambda *args: run_pass(*args) + 450)
    flags = shlex.split("--dry-run --device cpu --diffusion.gradient-accumulation 2")
    flags += ["--runs", tmp_path / "runs", "--diffusion.dataset-name", pictures]
    call(train.main, "ffhq-run1", *flags)
    printed = capsys.readouterr().out
    for part in (
        "50 images at 128x128",
        "45 images train, 5 validate",
        "60,372,867 parameters",
        "terminal SNR 0.15",
        "45 steps of 40 images: 45 epochs of 1 steps",
        "x_T still carries the image",
        f"goes to    {tmp_path / 'runs' / 'ffhq-run1-<time>'}",
    ):
        assert part in printed
    assert not (tmp_path / "runs").exists()
