"""Shared by all tests: a tiny experiment's flags, pictures to train on, and a run to sample from."""

import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import train
from functions.noise_scheduler import NoiseScheduler
from functions.prediction import Denoiser
from functions.sampling.generation import ImageSampler
from functions.sampling.options import SamplerOptions
from functions.support import run_folder
from functions.support.checkpoint import MOMENTS, check_whole
from models.unet import UNet

ROOT = Path(train.__file__).resolve().parent
CPU, OPTIONS = torch.device("cpu"), SamplerOptions()
# A network of 64,483 parameters on 16 x 16 images: the whole program in seconds.
TINY = [
    "--model.image-size",
    "16",
    "--model.lowest-resolution-size",
    "8",
    "--model.dim-multiply",
    "1,2",
    "--model.transformer-layers",
    "1",
    "--model.base-dim",
    "8",
    "--model.norm-groups",
    "2",
    "--diffusion.batch-size",
    "8",
    "--diffusion.gradient-accumulation",
    "1",
    "--diffusion.timesteps-diff",
    "100",
    "--diffusion.epochs",
    "2",
    "--diffusion.warmup-steps",
    "0",
    "--diffusion.log-every",
    "2",
    "--diffusion.validate-every",
    "5",
    "--diffusion.sample-every",
    "5",
    "--diffusion.checkpoint-every",
    "5",
    "--diffusion.validation-samples",
    "8",
    "--diffusion.grid-images",
    "4",
    "--diffusion.grid-steps",
    "4",
    "--diffusion.precision",
    "float32",
    "--diffusion.recompute",
    "norms",
    "--device",
    "cpu",
]
SMALL_MODEL = {
    "image_size": 16,
    "lowest_resolution_size": 8,
    "dim_multiply": (1, 2),
    "transformer_layers": (1,),
    "base_dim": 8,
    "norm_groups": 2,
}


@pytest.fixture(autouse=True)
def few_threads():
    """Tests are small; more threads than cores would only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of 50 simple pictures."""
    return draw_pictures(tmp_path_factory.mktemp("pictures"))


def draw_pictures(folder: Path) -> Path:
    """Fill a folder with 50 simple pictures, 20 x 20: a disc of one colour on another."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:20, :20]
    for i in range(50):
        background, disc = rng.integers(0, 256, (2, 3))
        inside = (y - rng.uniform(7, 13)) ** 2 + (x - rng.uniform(7, 13)) ** 2 < rng.uniform(
            3, 8
        ) ** 2
        image = np.where(inside[..., None], disc, background).astype(np.uint8)
        Image.fromarray(image).save(folder / f"{i:05d}.png")
    return folder


def call(main, *arguments):
    """A script's main with a command line, in this process."""
    before = sys.argv
    sys.argv = ["script.py", *map(str, arguments)]
    try:
        return main()
    finally:
        sys.argv = before


def script(*arguments, cwd=ROOT):
    """A script in a process of its own, as a shell starts it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def train_tiny(pictures, runs, *flags, name="faces"):
    """Train the tiny experiment with some flags more; returns its run folder, if there is one."""
    call(train.main, name, "--runs", runs, "--diffusion.dataset-name", pictures, *TINY, *flags)
    return next(runs.glob("*"), None)


@pytest.fixture(scope="session")
def tiny_run(pictures, tmp_path_factory):
    """A finished run of the tiny experiment: 45 training pictures, 10 steps of 8."""
    return train_tiny(pictures, tmp_path_factory.mktemp("runs"))


@pytest.fixture
def trained(pictures, tmp_path):
    """`train_tiny` on these pictures, in the test's own folder."""
    return partial(train_tiny, pictures, tmp_path)


@pytest.fixture
def path(tmp_path):
    """Where a checkpoint may be written."""
    return tmp_path / "step-00000005.safetensors"


def image_sampler_of(network, timesteps=100, options=OPTIONS, seed=0, device="cpu") -> ImageSampler:
    """How a network for images of 16 x 16 is sampled from."""
    return ImageSampler(
        Denoiser(network, NoiseScheduler(timesteps)),
        options,
        (3, 16, 16),
        seed,
        torch.device(device),
    )


def small_unet(size=16, dim_multiply=(1, 2), dropout=0.0) -> UNet:
    """A small network whose output is not zero, as it would be with fresh weights."""
    torch.manual_seed(0)
    model = UNet(size, 3, 8, dim_multiply, [1], 16, dropout, norm_groups=4)
    for parameter in model.parameters():
        parameter.data.add_(0.03 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def network():
    return small_unet()


class LittleMemory(torch.nn.Module):
    """A network, or another function of batches, that has memory for so many images at a time."""

    def __init__(self, network, most):
        super().__init__()
        # Sizes: those of the batches that did fit
        self.network, self.most, self.sizes = network, most, []

    def forward(self, batch, *t):
        if len(batch) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        self.sizes.append(len(batch))
        return self.network(batch, *t)


posix = pytest.mark.skipif(os.name != "posix", reason="signals")


def load_checkpoint(path) -> dict:
    """All that a checkpoint holds, to be compared."""
    file = check_whole(path)
    return {
        **file.contents,
        **{part: file.tensors(f"{part}.") for part in ("model", "ema", *MOMENTS)},
    }


def newest(run):
    return load_checkpoint(run_folder.checkpoints_of(run)[-1])


@pytest.fixture(scope="session")
def stopped_run(pictures, tmp_path_factory):
    runs = tmp_path_factory.mktemp("stopped")
    with pytest.raises(SystemExit, match="75"), during(7, terminate):
        train_tiny(pictures, runs)
    return next(runs.iterdir())


@pytest.fixture
def unfinished(stopped_run, tmp_path):
    """The tiny run, stopped by a signal after step 7 of 10, with checkpoints of steps 5 and 7."""
    return shutil.copytree(stopped_run, tmp_path / "runs" / stopped_run.name)


def during(step, act, name="update_ema"):
    """Within, something is done at the `step`-th call of a function of train.py."""
    calls, original = [], getattr(train, name)

    def acting(*args, **kwargs):
        calls.append(1)
        if len(calls) == step:
            act()
        return original(*args, **kwargs)

    return mock.patch.object(train, name, acting)


interrupt = mock.Mock(side_effect=KeyboardInterrupt)
terminate = lambda: signal.raise_signal(signal.SIGTERM)


def pytest_addoption(parser):
    parser.addoption(
        "--fuzz-cases",
        type=int,
        default=300,
        metavar="N",
        help="of tests/test_fuzz.py, in all (300)",
    )
    parser.addoption(
        "--fuzz-seed", type=int, default=0, metavar="S", help="number of the first of each kind (0)"
    )
