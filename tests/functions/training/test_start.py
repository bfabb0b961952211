"""What a training says and tries before its first step: a batch size that fits."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from config import EXPERIMENTS
from functions.noise_scheduler import NoiseScheduler
from functions.prediction import Denoiser
from functions.support.errors import UserError
from functions.support.processes import SINGLE_PROCESS
from functions.support.run_folder import Run
from functions.training.metrics import read_metrics
from functions.training.start import describe_memory, fit_memory
from models.unet import UNet
from tests.conftest import ROOT, TINY, call, newest, script
from tests.live_bytes import kept_per_image

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.\nmore")


@pytest.fixture
def memory(monkeypatch):
    """Sets how many images' passes fit in memory, by what is recomputed; and lists the passes tried, by their size."""
    forward, tried = UNet.forward, []

    def holds(**most):
        def limited(network, x_t, t):
            if torch.is_grad_enabled():
                tried.append(len(x_t))
                if len(x_t) > most.get(network.recompute, 0):
                    raise OUT_OF_MEMORY
            return forward(network, x_t, t)

        monkeypatch.setattr(UNet, "forward", limited)
        return tried

    return holds


def trained(pictures, runs, *flags):
    """The folder of a finished run of 2 epochs of 5 steps of 8 images."""
    call(
        train.main, "faces", *TINY, "--model.dropout", 0.1, "--diffusion.dataset-name", pictures, "--runs", runs, *flags
    )
    return next(runs.iterdir())


@pytest.mark.parametrize(
    ("most", "fits"),
    [
        ({"norms": 3}, {"batch_size": 2, "gradient_accumulation": 4, "recompute": "norms"}),
        ({"blocks": 1}, {"batch_size": 1, "gradient_accumulation": 8, "recompute": "blocks"}),
    ],
)
def test_a_batch_that_fits_changes_nothing_else(most, fits, memory, pictures, tmp_path, capsys):
    """Each divisor of 8 is tried; the run is then, bit for bit, the one that was started so."""
    flags = [part for name, value in fits.items() for part in (f"--diffusion.{name.replace('_', '-')}", value)]
    asked = trained(pictures, tmp_path / "asked", *flags)
    capsys.readouterr()
    tried = memory(**most)
    found = trained(pictures, tmp_path / "found")
    sizes = [8, 4, 2] if "norms" in most else [8, 4, 2, 1, 1]
    assert tried[: len(sizes)] == sizes
    printed = capsys.readouterr().out
    for size in sizes[: sizes.index(fits["batch_size"])]:
        assert f"out of memory with batch_size = {size}, recompute = 'norms'\n" in printed
    assert f"going on with {', '.join(f'{name} = {value}' for name, value in fits.items())}\n" in printed
    columns = ("loss", "val_loss", "val_loss_ema", "grad_norm")
    rows = [[[row[c] for c in columns] for row in read_metrics(run / "metrics.csv")] for run in (asked, found)]
    assert rows[0] == rows[1]
    states = [newest(asked), newest(found)]
    for part in ("model", "ema", "exp_avg", "exp_avg_sq"):
        assert all(torch.equal(tensor, states[1][part][name]) for name, tensor in states[0][part].items())
    config = json.loads((found / "config.json").read_text())
    assert {name: config["diffusion"][name] for name in fits} == fits
    assert config == {**json.loads((asked / "config.json").read_text()), "experiment": "faces"}
    assert states[0]["config"] == states[1]["config"]


def parts(batch_size=4, recompute="norms", **model):
    """A run without a folder, and its network."""
    experiment = EXPERIMENTS["faces"].override(
        {"batch_size": batch_size, "gradient_accumulation": 3, "recompute": recompute},
        {"image_size": 16, "lowest_resolution_size": 8, "dim_multiply": (1, 2), "transformer_layers": (1,),
         "base_dim": 8, "norm_groups": 2, **model},
    )  # fmt: skip
    network = UNet(**vars(experiment.model)).to(memory_format=torch.channels_last)
    network.set_recompute(recompute)
    facts = {"parameters": sum(p.numel() for p in network.parameters()), "arithmetic": {}}
    run = Run("faces", experiment, Path("runs"), facts=facts)
    return run, Denoiser(network, NoiseScheduler(100))


def test_a_try_leaves_nothing_behind(memory):
    run, denoiser = parts()
    tried = memory(norms=3)
    before = {name: p.clone() for name, p in denoiser.network.named_parameters()}
    fit_memory(run, denoiser, SINGLE_PROCESS)
    config = run.experiment.diffusion
    assert tried == [4, 3]  # 12 images in passes of 3
    assert (config.batch_size, config.gradient_accumulation, run.facts["arithmetic"]["batch_size"]) == (3, 4, 3)
    for name, parameter in denoiser.network.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch):
    monkeypatch.setattr(UNet, "forward", lambda network, x_t, t: x_t @ t)
    with pytest.raises(RuntimeError):
        fit_memory(*parts(), SINGLE_PROCESS)


@pytest.mark.parametrize(("recompute", "sizes"), [("norms", [4, 3, 2, 1, 1]), ("blocks", [4, 3, 2, 1])])
def test_when_nothing_fits_it_is_said(recompute, sizes, memory):
    tried = memory(norms=0)
    with pytest.raises(UserError, match="out of memory with one image at a time"):
        fit_memory(*parts(recompute=recompute), SINGLE_PROCESS)
    assert tried == sizes


PROGRAM = """
import os, sys, torch, train
from config import ConfigError
from models.unet import UNet
from tests.conftest import call
forward = UNet.forward
def limited(network, x_t, t):
    if os.environ.get("RANK", "1") == "1" and len(x_t) > {most}:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.\\nmore")
    return forward(network, x_t, t)
UNet.forward = limited
with train.plain_errors(ConfigError):
    call(train.main, *sys.argv[1:])
"""


def test_the_script_then_ends_with_a_sentence(pictures, tmp_path):
    (tmp_path / "limited.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})" + PROGRAM.format(most=0))
    result = script(tmp_path / "limited.py", "faces", *TINY, "--diffusion.dataset-name", pictures, "--runs",
                    tmp_path / "runs")  # fmt: skip
    assert result.returncode == 2, result.stderr
    assert "error: out of memory with one image at a time: take a smaller base_dim" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(os.name != "posix", reason="torchrun with gloo")
def test_processes_take_what_fits_in_all_of_them(pictures, tmp_path):
    """Of two, the second has no memory for more than one image."""
    (tmp_path / "limited.py").write_text(PROGRAM.format(most=1))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2,
               tmp_path / "limited.py", "faces", *TINY, "--model.dropout", 0, "--diffusion.dataset-name", pictures,
               "--runs", tmp_path / "two"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True,
                            timeout=300, check=False)  # fmt: skip
    assert result.returncode == 0, result.stderr
    going_on = "going on with batch_size = 1, gradient_accumulation = 8, recompute = norms"
    assert result.stdout.count(going_on) == 1
    one = trained(pictures, tmp_path / "one", "--model.dropout", 0, "--diffusion.batch-size", 1,
                  "--diffusion.gradient-accumulation", 8)  # fmt: skip
    rows = [read_metrics(run / "metrics.csv") for run in (one, next((tmp_path / "two").iterdir()))]
    for alone, together in zip(*rows, strict=True):
        assert together["loss"] == pytest.approx(alone["loss"], rel=2e-4)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", ["none", "norms", "blocks"])
def test_the_guess_at_the_memory_is_near_the_truth(recompute, precision):
    """The levels of the reference network and of faces, narrower; a large batch, for the digits."""
    for name, size, lowest in (("ffhq-run1", 64, 4), ("faces", 32, 4)):
        levels = {part: getattr(EXPERIMENTS[name].model, part) for part in ("dim_multiply", "transformer_layers")}
        model = {**levels, "image_size": size, "lowest_resolution_size": lowest, "base_dim": 16}
        run, denoiser = parts(1000, recompute, **model)
        guess = float(re.search(r"about (.*) GB", describe_memory(run, precision))[1]) * 1e9
        truth = 16 * run.facts["parameters"] + 1000 * kept_per_image(denoiser.network, precision)
        assert truth / 1.5 < guess < truth * 1.5


@pytest.mark.parametrize("name", ["ffhq-run1", "ffhq-run2", "ffhq-full"])
def test_the_ffhq_runs_are_ready_at_their_real_size(name, pictures, tmp_path, capsys):
    """Real network and config on few pictures; the batch fits 45 of them."""
    call(train.main, name, "--dry-run", "--runs", tmp_path, "--diffusion.dataset-name", pictures, "--device", "cpu",
         "--diffusion.gradient-accumulation", "2")  # fmt: skip
    printed = capsys.readouterr().out
    parameters = {"ffhq-run1": "60,372,867", "ffhq-run2": "60,372,867", "ffhq-full": "241,348,355"}[name]
    assert f"{parameters} parameters" in printed
    assert ("x_T still carries the image" in printed) == (name == "ffhq-run1")
    assert "1 steps" in printed


def test_a_dry_run_says_everything_and_starts_nothing(pictures, tmp_path, capsys):
    call(train.main, "ffhq-full", "--dry-run", "--runs", tmp_path / "runs", "--diffusion.dataset-name", pictures, *TINY)
    printed = capsys.readouterr().out
    for part in (
        "50 images at 16x16",
        "45 images train, 5 validate",
        "10 steps of 8 images: 2 epochs of 5 steps",
        "parameters",
        "terminal SNR",
        "goes to",
    ):
        assert part in printed
    assert not (tmp_path / "runs").exists()
