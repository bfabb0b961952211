"""What a training says and tries before its first step: a batch size that fits."""

import json
import shlex
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import train
from config import EXPERIMENTS
from functions.noise_scheduler import NoiseScheduler
from functions.optimizers import Muon
from functions.prediction import Denoiser
from functions.support.errors import UserError
from functions.support.processes import SINGLE_PROCESS
from functions.support.run_folder import Facts, Run, describe
from functions.training import memory
from models.unet import UNet
from tests.conftest import SMALL_MODEL, call, train_tiny
from tests.kill import assert_same_run


def limit_memory(patch, most):
    """Let a pass of training have at most so many images.

    Returns a list that gets the size of each pass that is tried.
    """
    forward = UNet.forward
    tried = []

    def limited(network, x_t, t):
        if torch.is_grad_enabled():
            tried.append(len(x_t))
            if len(x_t) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.\nmore")
        return forward(network, x_t, t)

    patch.setattr(UNet, "forward", limited)
    return tried


@pytest.mark.slow
def test_a_batch_that_fits_changes_nothing_else(monkeypatch, pictures, tmp_path, capsys):
    """Each divisor of 4 is tried. The run is then the one that was started with what was found."""
    flags = ["--model.dropout", 0.1, "--diffusion.batch-size", 4, "--diffusion.epochs", 1]
    by_one = shlex.split("--diffusion.batch-size 1 --diffusion.gradient-accumulation 4")
    asked = train_tiny(pictures, tmp_path / "asked", *flags, *by_one)
    capsys.readouterr()

    tried = limit_memory(monkeypatch, 1)
    found = train_tiny(pictures, tmp_path / "found", *flags)
    assert tried[:3] == [4, 2, 1]
    printed = capsys.readouterr().out
    for size in (4, 2):
        assert f"out of memory with batch_size = {size}\n" in printed
    assert "continuing with batch_size = 1, gradient_accumulation = 4\n" in printed

    assert_same_run(asked, found)
    config = json.loads((found / "config.json").read_text())
    assert config == json.loads((asked / "config.json").read_text())


def parts():
    """Return an experiment, and its denoiser."""
    passes = {"batch_size": 4, "gradient_accumulation": 3, "recompute": "norms"}
    experiment = EXPERIMENTS["faces"].override(passes, SMALL_MODEL)
    network = UNet(**vars(experiment.model)).to(memory_format=torch.channels_last)
    network.set_recompute("norms")
    return experiment, Denoiser(network, NoiseScheduler(100))


def test_a_try_leaves_nothing_behind(monkeypatch):
    experiment, denoiser = parts()
    before = {name: p.clone() for name, p in denoiser.network.named_parameters()}
    tried = limit_memory(monkeypatch, 3)
    config = memory.fit_memory(experiment, denoiser, SINGLE_PROCESS).diffusion

    # The 12 images of a step come in passes of 3 then.
    assert tried == [4, 3]
    assert config.batch_size == 3
    assert config.gradient_accumulation == 4
    for name, parameter in denoiser.network.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


@pytest.mark.slow
def test_when_nothing_fits_it_is_said(monkeypatch, pictures, tmp_path):
    tried = limit_memory(monkeypatch, 0)
    message = "out of memory with one image at a time: use a smaller base_dim"
    with pytest.raises(UserError, match=message):
        train_tiny(pictures, tmp_path / "runs")
    assert tried == [8, 4, 2, 1]
    assert not (tmp_path / "runs").exists()


def test_an_error_that_is_not_lack_of_memory_is_raised(monkeypatch):
    experiment, denoiser = parts()
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(UNet, "forward", Mock(side_effect=error))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        memory.fit_memory(experiment, denoiser, SINGLE_PROCESS)


# At 32 the upsampling is a transposed convolution with 16 taps. At 16 it is a 3x3 convolution of
# the doubled image.
@pytest.mark.parametrize("size", [16, 32])
def test_flops_are_those_of_the_layers(size):
    """The FLOPs are added up here by hand, layer by layer: a multiplication and an addition are 2.

    A layer's backward costs twice its forward, as it has two gradients: of its weights, and of its
    input where that needs one.
    """
    half = size // 2
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

    # Then there is the upsampling, of either kind.
    forward += conv(16, 16, 16, half) if half == 16 else conv(16, 16, 9, size)

    # There are five blocks at the full resolution, and seven at half of it with the bottleneck's.
    forward += 2 * block(8, 8, size) + block(24, 8, size) + 2 * block(16, 8, size)
    forward += block(8, 16, half) + 3 * block(16, 16, half)
    forward += 2 * block(32, 16, half) + block(24, 16, half)

    # In six layers of attention there are four projections, and two products of all pixels with
    # all: queries with keys, and weights with values.
    forward += 6 * (4 * conv(16, 16, 1, half) + 4 * half**4 * 16)

    # Backward costs twice a forward pass. To recompute norms is free, as it has no product.
    for recompute in ("none", "norms"):
        network.set_recompute(recompute)
        assert memory.flops_of_image(network) == 3 * forward - first

    # Counting leaves the network as it was.
    for parameter in network.parameters():
        assert parameter.grad is None
        assert parameter.device.type == "cpu"


@pytest.mark.slow
@pytest.mark.parametrize(("slow", "timed"), [(False, 8), (True, 1)])
def test_a_dry_run_says_the_hours_of_the_steps_to_go(
    slow, timed, unfinished, pictures, monkeypatch, capsys
):
    """A step is made to take an hour, so hours are the steps to go.

    There are 10 steps of 8 images, and for the same run after 7 of them there are 3. An image takes
    450 s where the machine is slow, and one image is timed; else the better of two whole passes is.
    """
    flops = 8 * memory.flops_of_image(UNet(16, 3, 8, [1, 2], [1], 8, norm_groups=2))
    # After the single image a whole pass is tried for its memory, and its time does not count.
    timings = [450] if slow else [0.1, 99 * 450, 450 * timed, 451 * timed]

    # The first pass of each dry run warms up, and its time does not count either.
    passes = iter([99 * 450, *timings, 99 * 450, *timings])
    monkeypatch.setattr(memory, "run_pass", lambda *_: next(passes))
    train_tiny(pictures, unfinished.parent, "--dry-run")
    call(train.main, "--resume", unfinished, "--dry-run", "--device", "cpu")

    new, resumed, _ = capsys.readouterr().out.split("nothing was started")
    for printed, steps in ((new, 10), (resumed, 3)):
        description = " ".join(printed.split())
        work = f"{flops / 1e12:.3g} TFLOP a step; the {steps} steps to go take about "
        assert f"{work}{steps:.2f} hours on one cpu, " in description
        assert f"by timing forward and backward of {timed} images in" in description


@pytest.mark.slow
@pytest.mark.parametrize("most", [3, 1])
def test_a_dry_run_times_passes_that_fit(most, monkeypatch):
    """Memory is short for batch_size = 4."""
    experiment, denoiser = parts()
    limit_memory(monkeypatch, most)

    optimizer = Muon(denoiser.network.parameters(), 1e-3, torch.float32)

    description = memory.describe_compute(experiment, denoiser, optimizer, 1, SINGLE_PROCESS)
    assert description.endswith(f"by timing\n             forward and backward of {most}")

    # A step of Newton-Schulz has two products with a matrix, and the square of its Gram matrix.
    flops = 12 * memory.flops_of_image(denoiser.network)
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
    run_pass = memory.run_pass
    monkeypatch.setattr(memory, "run_pass", lambda *args: run_pass(*args) + 450)
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
