"""What a training says and tries before its first step: a batch size that fits."""

import json
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import train
from config import EXPERIMENTS
from functions.noise_scheduler import NoiseScheduler
from functions.prediction import Denoiser
from functions.support.errors import UserError
from functions.support.processes import SINGLE_PROCESS
from functions.support.run_folder import Run
from functions.training import start
from models.unet import UNet
from tests.conftest import SMALL_MODEL, TINY, call, train_tiny
from tests.kill import assert_same_run


def limit_memory(patch, **most):
    """To so many images' passes, by what is recomputed; returns a list of the passes that are tried, by their size."""
    forward, tried = UNet.forward, []

    def limited(network, x_t, t):
        if torch.is_grad_enabled():
            tried.append(len(x_t))
            if len(x_t) > most.get(network.recompute, 0):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.\nmore")
        return forward(network, x_t, t)

    patch.setattr(UNet, "forward", limited)
    return tried


@pytest.mark.slow
def test_a_batch_that_fits_changes_nothing_else(monkeypatch, pictures, tmp_path, capsys):
    """Each divisor of 4 is tried; the run is then, bit for bit, the one that was started so."""
    flags = ["--model.dropout", 0.1, "--diffusion.batch-size", 4, "--diffusion.epochs", 1]
    own = [
        "--diffusion.batch-size",
        1,
        "--diffusion.gradient-accumulation",
        4,
        "--diffusion.recompute",
        "blocks",
    ]
    asked = train_tiny(pictures, tmp_path / "asked", *flags, *own)
    capsys.readouterr()
    tried = limit_memory(monkeypatch, blocks=1)
    found = train_tiny(pictures, tmp_path / "found", *flags)
    assert tried[:4] == [4, 2, 1, 1]
    printed = capsys.readouterr().out
    for size in (4, 2, 1):
        assert f"out of memory with batch_size = {size}, recompute = 'norms'\n" in printed
    assert (
        "going on with batch_size = 1, gradient_accumulation = 4, recompute = blocks\n" in printed
    )
    assert_same_run(asked, found)
    configs = [json.loads((run / "config.json").read_text()) for run in (asked, found)]
    assert configs[0] == configs[1]


def parts():
    """A run without a folder, and its network."""
    passes = {"batch_size": 4, "gradient_accumulation": 3, "recompute": "norms"}
    experiment = EXPERIMENTS["faces"].override(passes, SMALL_MODEL)
    network = UNet(**vars(experiment.model)).to(memory_format=torch.channels_last)
    network.set_recompute("norms")
    run = Run("faces", experiment, Path("runs"), facts={"arithmetic": {}})
    return run, Denoiser(network, NoiseScheduler(100))


def test_a_try_leaves_nothing_behind(monkeypatch):
    run, denoiser = parts()
    tried = limit_memory(monkeypatch, norms=3)
    before = {name: p.clone() for name, p in denoiser.network.named_parameters()}
    start.fit_memory(run, denoiser, SINGLE_PROCESS)
    config = run.experiment.diffusion
    assert tried == [4, 3]  # 12 images in passes of 3
    assert (
        config.batch_size,
        config.gradient_accumulation,
        run.facts["arithmetic"]["batch_size"],
    ) == (3, 4, 3)
    for name, parameter in denoiser.network.named_parameters():
        assert parameter.grad is None and torch.equal(parameter, before[name])


def test_when_nothing_fits_it_is_said(monkeypatch, pictures, tmp_path):
    tried = limit_memory(monkeypatch, norms=0)
    with pytest.raises(
        UserError, match="out of memory with one image at a time: take a smaller base_dim"
    ):
        call(
            train.main,
            "faces",
            *TINY,
            "--diffusion.dataset-name",
            pictures,
            "--runs",
            tmp_path / "runs",
        )
    assert tried == [8, 4, 2, 1, 1]
    assert not (tmp_path / "runs").exists()


def test_an_error_that_is_not_lack_of_memory_is_raised(monkeypatch):
    run, denoiser = parts()
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(UNet, "forward", Mock(side_effect=error))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        start.fit_memory(run, denoiser, SINGLE_PROCESS)
    assert run.experiment.diffusion.batch_size == 4


# At 32 the upsampling is a transposed convolution with 16 taps
@pytest.mark.parametrize("size", [16, 32])
def test_flops_are_those_of_the_layers(size):
    network, half = UNet(size, 3, size // 2, [1, 2], [1], 8, norm_groups=2), size // 2
    conv = lambda c_in, c_out, taps, pixels: 2 * c_in * c_out * taps * pixels**2

    def block(c_in, c_out, pixels):
        shortcut = conv(c_in, c_out, 1, pixels) if c_in != c_out else 0
        return (
            conv(c_in, c_out, 9, pixels) + conv(c_out, c_out, 9, pixels) + shortcut + 2 * 32 * c_out
        )

    first = conv(3, 8, 9, size) + 2 * 8 * 32  # the two layers whose inputs need no gradient
    forward = first + 2 * 32 * 32 + conv(8, 8, 9, half) + conv(8, 3, 9, size)
    forward += conv(16, 16, 16, half) if half == 16 else conv(16, 16, 9, size)
    forward += 2 * block(8, 8, size) + block(24, 8, size) + 2 * block(16, 8, size)
    forward += (
        block(8, 16, half) + 3 * block(16, 16, half) + 2 * block(32, 16, half) + block(24, 16, half)
    )
    forward += 6 * (4 * conv(16, 16, 1, half) + 4 * half**4 * 16)  # attention
    for recompute in ("none", "norms"):
        network.set_recompute(recompute)
        assert start.flops_of_image(network) == 3 * forward - first
    network.set_recompute("blocks")
    assert 3.5 * forward < start.flops_of_image(network) < 4 * forward
    assert all(p.grad is None and p.device.type == "cpu" for p in network.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(("slow", "timed"), [(False, 8), (True, 1)])
def test_a_dry_run_says_the_hours_of_the_steps_to_go(
    slow, timed, unfinished, pictures, monkeypatch, capsys
):
    """10 steps of 8 images, and the same run after 7 of them; on an H100 so slow that it takes an hour for a step."""
    flops = 8 * start.flops_of_image(UNet(16, 3, 8, [1, 2], [1], 8, norm_groups=2))
    # The first warms up
    passes = iter([99 * 450, *([450] if slow else [0.1, 450 * timed, 451 * timed])] * 2)
    monkeypatch.setattr(start, "run_pass", lambda *_: next(passes))
    monkeypatch.setattr(start, "H100_PEAK", flops / 3600 / start.H100_SHARE)
    call(
        train.main,
        "faces",
        "--dry-run",
        *TINY,
        "--diffusion.dataset-name",
        pictures,
        "--runs",
        unfinished.parent,
    )
    call(train.main, "--resume", unfinished, "--dry-run", "--device", "cpu")
    new, resumed, _ = capsys.readouterr().out.split("nothing was started")
    for said, steps in ((new, 10), (resumed, 3)):
        said = " ".join(said.split())
        work = f"{flops / 1e12:.3g} TFLOP a step; the {steps} steps to go take about {steps:.2f} hours on one cpu, "
        assert work in said
        assert (
            f"by timing forward and backward of {timed}, and {steps:.2f} on one H100 at 15% of its"
            in said
        )


@pytest.mark.slow
def test_ffhq_run1_is_ready_at_its_real_size(pictures, tmp_path, capsys):
    """Real network and config on few pictures; the batch fits 45 of them. Nothing is started."""
    call(
        train.main,
        "ffhq-run1",
        "--dry-run",
        "--runs",
        tmp_path / "runs",
        "--diffusion.dataset-name",
        pictures,
        "--device",
        "cpu",
        "--diffusion.gradient-accumulation",
        "2",
    )
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
    experiment, config = EXPERIMENTS[name], EXPERIMENTS[name].diffusion
    scheduler = NoiseScheduler(
        config.timesteps_diff, config.beta_start, config.beta_end, config.rescale_betas
    )
    facts = {
        "terminal_snr": scheduler.terminal_snr,
        "split": "",
        "parameters": 1,
        "total_steps": 1,
        "device": "cpu",
        "steps_per_epoch": 1,
        "arithmetic": {"precision": "float32"},
    }
    said = start.describe(Run(name, experiment, Path("runs"), facts=facts), "")
    assert ("x_T still carries the image" in said) == visible
    assert ("samples use the raw weights" in said) == visible  # it has no EMA either
