"""What a training says before its first step: what the run is, and what it costs."""

import shlex
from pathlib import Path

import pytest
import torch

import train
from config import EXPERIMENTS
from functions.noise_scheduler import NoiseScheduler
from functions.optimizers import Muon
from functions.prediction import Denoiser
from functions.support.run_folder import Facts, Run, describe
from functions.training import cost
from models.unet import UNet
from tests.conftest import SMALL_MODEL, call, train_tiny


def test_flops_are_those_of_the_layers():
    """The FLOPs are added up here by hand, layer by layer: a multiplication and an addition are 2.

    A layer's backward costs twice its forward, as it has two gradients: of its weights, and of its
    input where that needs one.
    """
    size, half = 16, 8
    network = UNet(size, 3, half, [1, 2], [1], 8, norm_groups=2)

    def conv(c_in, c_out, taps, pixels):
        """Count a convolution with an output of `pixels` by `pixels`."""
        return 2 * c_in * c_out * taps * pixels**2

    def block(c_in, c_out, pixels):
        """Add up a residual block, where the embedding of t has 32 channels."""
        convolutions = conv(c_in, c_out, 9, pixels) + conv(c_out, c_out, 9, pixels)
        shortcut = conv(c_in, c_out, 1, pixels) if c_in != c_out else 0
        return convolutions + shortcut + 2 * 32 * c_out

    # These are the two layers whose inputs need no gradient: of the image, and of the embedding.
    first = conv(3, 8, 9, size) + 2 * 8 * 32

    # Next come the second layer of the embedding, the downsampling and the output.
    forward = first + 2 * 32 * 32 + conv(8, 8, 9, half) + conv(8, 3, 9, size)

    # Then there is the upsampling, whose convolution follows the doubling.
    forward += conv(16, 16, 9, size)

    # There are five blocks at the full resolution, and seven at half of it with the bottleneck's.
    forward += 2 * block(8, 8, size) + block(24, 8, size) + 2 * block(16, 8, size)
    forward += block(8, 16, half) + 3 * block(16, 16, half)
    forward += 2 * block(32, 16, half) + block(24, 16, half)

    # In six layers of attention there are four projections, and two products of all pixels with
    # all: queries with keys, and weights with values.
    forward += 6 * (4 * conv(16, 16, 1, half) + 4 * half**4 * 16)

    # Backward costs twice a forward pass.
    assert cost.flops_of_image(network) == 3 * forward - first

    # Counting leaves the network as it was.
    for parameter in network.parameters():
        assert parameter.grad is None
        assert parameter.device.type == "cpu"


@pytest.mark.slow
@pytest.mark.parametrize(("seconds", "timed"), [(0.5, 8), (450, 1)])
def test_a_dry_run_says_the_hours_of_the_steps_to_go(
    seconds, timed, unfinished, pictures, monkeypatch, capsys
):
    """A step is made to take an hour, so hours are the steps to go.

    There are 10 steps of 8 images, and for the same run after 7 of them there are 3. An image takes
    450 s. The pass of one image is timed if it takes long, else the best of whole passes.
    """
    flops = 8 * cost.flops_of_image(UNet(16, 3, 8, [1, 2], [1], 8, norm_groups=2))

    def run_pass(denoiser, shape):
        return seconds if shape[0] == 1 else 450 * 8

    monkeypatch.setattr(cost, "run_pass", run_pass)
    train_tiny(pictures, unfinished.parent, "--dry-run")
    call(train.main, "--resume", unfinished, "--dry-run", "--device", "cpu")

    new, resumed, _ = capsys.readouterr().out.split("nothing was started")
    for printed, steps in ((new, 10), (resumed, 3)):
        description = " ".join(printed.split())
        assert f"{flops / 1e12:.3g} TFLOP a step; forward and backward of {timed} on" in description
        assert f"so the {steps} steps to go take about {steps:.2f} hours" in description


@pytest.mark.slow
def test_the_optimiser_counts_too():
    """A step of Newton-Schulz has two products with a matrix, and the square of its Gram matrix."""
    passes = {"batch_size": 4, "gradient_accumulation": 3}
    experiment = EXPERIMENTS["faces"].override(passes, SMALL_MODEL)
    denoiser = Denoiser(UNet(**vars(experiment.model)), NoiseScheduler(100))
    optimizer = Muon(denoiser.network.parameters(), 1e-3, torch.float32)
    description = cost.describe_cost(experiment, denoiser, optimizer, 1, 12)

    flops = 12 * cost.flops_of_image(denoiser.network)
    for parameter in denoiser.network.parameters():
        short, long = sorted([len(parameter), parameter[0].numel()])
        if parameter.ndim > 1 and short >= 16:
            flops += 5 * (2 * 2 * short**2 * long + 2 * short**3)
    assert f" {flops / 1e12:.3g} TFLOP a step" in description


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


@pytest.mark.parametrize(
    ("name", "visible"), [("ffhq-run1", True), ("ffhq-run2", False), ("ffhq-full", False)]
)
def test_of_the_ffhq_runs_only_the_first_sees_the_image_in_x_T(name, visible):
    experiment = EXPERIMENTS[name]
    config = experiment.diffusion
    scheduler = NoiseScheduler(
        config.timesteps_diff, config.beta_start, config.beta_end, config.rescale_betas
    )
    facts = Facts(terminal_snr=scheduler.terminal_snr, arithmetic={"precision": "float32"})
    description = describe(Run(name, experiment, Path("runs")), facts, "")
    assert ("x_T still carries the image" in description) == visible

    # The first run has no EMA either.
    assert ("samples use the raw weights" in description) == visible
