"""What all tests share: a tiny experiment's flags, pictures to train on, a run to sample from."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import train
from functions.denoiser import Denoiser
from functions.noise_scheduler import NoiseScheduler
from functions.sampling.generation import Pipeline
from functions.sampling.models import Models
from functions.sampling.settings import SamplingConfig
from functions.saved import run_folder
from functions.saved.checkpoint import verify_checkpoint
from functions.support.errors import UserError
from functions.training import recorder
from models.unet import UNet

ROOT = Path(train.__file__).resolve().parent
CPU = torch.device("cpu")

# Of the 50 simple pictures, these are held out: the SHA-256 of their names, 00033.png and so on,
# begins with a number below a tenth.
HELD_OUT = [33, 43, 48, 49]
TRAINED = [i for i in range(50) if i not in HELD_OUT]

# The network has 64,483 parameters and makes images of 16 x 16: the whole program takes seconds.
TINY = """
    --model.image-size 16
    --model.lowest-resolution-size 8
    --model.dim-multiply 1 2
    --model.transformer-layers 1
    --model.base-dim 8
    --model.norm-groups 2
    --diffusion.batch-size 8
    --diffusion.gradient-accumulation 1
    --diffusion.timesteps-diff 100
    --diffusion.epochs 2
    --diffusion.warmup-steps 0
    --diffusion.log-every 2
    --diffusion.validate-every 5
    --diffusion.sample-every 5
    --diffusion.checkpoint-every 5
    --diffusion.validation-samples 8
    --diffusion.grid-images 4
    --diffusion.grid-steps 4
    --diffusion.precision float32
    --device cpu
"""
# With these flags it has one level, which has all kinds of layers but those between levels.
ONE_LEVEL = """
    --model.image-size 8
    --model.dim-multiply 1
    --model.transformer-layers
"""
# With these it draws the details of images of twice the size.
DETAILS = """
    --model.image-size 32
    --model.lowest-resolution-size 16
    --model.network details
    --diffusion.objective v
    --diffusion.beta-schedule cosine
    --diffusion.log-snr-shift -5.3185
"""
# The same network, as fields of ModelConfig.
SMALL_MODEL = {
    "image_size": 16,
    "channels": 3,
    "lowest_resolution_size": 8,
    "dim_multiply": (1, 2),
    "transformer_layers": (1,),
    "base_dim": 8,
    "norm_groups": 2,
}


# Drawing the curves takes a third of the time of a tiny training, so only `tiny_run` does it.
no_curves = mock.patch.object(recorder, "plot_losses", lambda metrics, path, title: path.touch())
no_curves.start()
# Tests are small, and more threads than cores would only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Return a folder of 50 simple pictures."""
    return draw_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def labelled_pictures(tmp_path_factory):
    """Return a folder of the same pictures in two folders, a and b, which are their labels."""
    folder = draw_pictures(tmp_path_factory.mktemp("labelled"))
    for i, picture in enumerate(sorted(folder.iterdir())):
        target = folder / "ab"[i % 2] / picture.name
        target.parent.mkdir(exist_ok=True)
        picture.rename(target)
    return folder


def draw_pictures(folder: Path) -> Path:
    """Fill a folder with 50 simple pictures, 20 x 20: a disc of one colour on another."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:20, :20]
    for i in range(50):
        background, disc = rng.integers(0, 256, (2, 3))
        center_y, center_x, radius = rng.uniform((7, 7, 3), (13, 13, 8))
        inside = np.hypot(y - center_y, x - center_x) < radius
        image = np.where(inside[..., None], disc, background).astype(np.uint8)
        Image.fromarray(image).save(folder / f"{i:05d}.png")
    return folder


def split_folder(pictures, folder, trained, held_out=1):
    """Return a folder with the first pictures in train/ and the next ones in val/."""
    for i in range(trained + held_out):
        part = folder / ("train" if i < trained else "val")
        part.mkdir(parents=True, exist_ok=True)
        shutil.copy(pictures / f"{i:05d}.png", part)
    return folder


def pixels_of(path):
    """Return the pixels of an image file."""
    return np.asarray(Image.open(path))


def only_in(folder):
    """Return the path of the one file or folder in a folder, such as the one run of `--runs`."""
    [path] = folder.iterdir()
    return path


def files_of(folder):
    """Return the bytes of all files in a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def shrunk(images):
    """Return float images (B, C, 2H, 2W), shrunk by Pillow to (B, C, H, W)."""
    size = images.shape[-1] // 2, images.shape[-2] // 2
    channels = [Image.fromarray(channel) for channel in images.flatten(0, 1).numpy()]
    small = [np.array(image.resize(size, Image.Resampling.LANCZOS)) for image in channels]
    return torch.from_numpy(np.stack(small)).unflatten(0, images.shape[:2])


def samples_of(folder):
    """Return the single images that sample.py wrote to a folder, in their order: (N, H, W, C)."""
    return np.stack([pixels_of(path) for path in sorted(folder.glob("0*.png"))])


def words(*arguments):
    """Return the words of a command line; a text may have several, with spaces between them."""
    return [
        word
        for argument in arguments
        for word in (argument.split() if isinstance(argument, str) else [str(argument)])
    ]


def call(script, *arguments, function="main"):
    """Run a script's main with this command line, in this process, and return its result."""
    with mock.patch.object(sys, "argv", ["script.py", *words(*arguments)]):
        return getattr(script, function)()


def script(*arguments, cwd=ROOT):
    """Run a script in a process of its own, as a shell does, and return the finished process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words(*arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def train_tiny(pictures, runs, *flags, name="faces"):
    """Train the tiny experiment with additional flags; return its run folder, if there is one."""
    call(train, name, "--runs", runs, "--diffusion.dataset-name", pictures, TINY, *flags)
    return next(runs.glob("*"), None)


@pytest.fixture(scope="session")
def tiny_run(pictures, tmp_path_factory):
    """Return a finished run of the tiny experiment: 46 training pictures, 10 steps of 8."""
    no_curves.stop()
    run = train_tiny(pictures, tmp_path_factory.mktemp("runs"))
    no_curves.start()
    return run


@pytest.fixture(scope="session")
def grey_run(pictures, tmp_path_factory):
    """Return a finished run like `tiny_run`, of a network with one channel."""
    return train_tiny(pictures, tmp_path_factory.mktemp("grey"), "--model.channels 1")


@pytest.fixture(scope="session")
def details_run(pictures, tmp_path_factory):
    """Return a finished run like `tiny_run`, of the details of images of twice the size."""
    return train_tiny(pictures, tmp_path_factory.mktemp("details"), DETAILS)


@pytest.fixture(scope="session")
def their_folder(tmp_path_factory):
    """Return the folder of a pipeline of diffusers, of another shape than any network of ours."""
    from tests.theirs import write_pipeline

    return write_pipeline(tmp_path_factory.mktemp("pipelines") / "theirs")


@pytest.fixture
def trained(pictures, tmp_path):
    """Return `train_tiny` for these pictures and the test's own folder."""
    return partial(train_tiny, pictures, tmp_path)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Work in the test's own folder, and return it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def path(tmp_path):
    """Return a path to which a checkpoint may be written."""
    return tmp_path / "step-00000005.safetensors"


def pipeline_of(network, timesteps=100, seed=0, device=CPU, **settings) -> Pipeline:
    """Return the pipeline with these settings by a network for images of 16 x 16."""
    models = Models(Denoiser(network, NoiseScheduler(timesteps)), (3, 16, 16), device)
    return Pipeline(models, SamplingConfig(model="network", **settings), seed)


def changed(pipeline, models=(), **settings) -> Pipeline:
    """Return a pipeline with other settings, and other fields of its `Models`."""
    models = replace(pipeline.models, **dict(models))
    return replace(pipeline, models=models, config=replace(pipeline.config, **settings))


def normal(seed, *shape, dtype=torch.float32):
    """Return standard normal numbers of a shape, which follow from the seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype)


def small_unet(dim_multiply=(1, 2)) -> UNet:
    """Return a small network whose output is not zero."""
    torch.manual_seed(0)
    model = UNet(16, 3, 8, dim_multiply, [1], 16, norm_groups=4)
    # The last layer of a fresh network is zero, and so is its output, until noise is added.
    for parameter in model.parameters():
        parameter.data.add_(0.03 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def network():
    """Return one `small_unet` for all tests of a file."""
    return small_unet()


class LittleMemory(torch.nn.Module):
    """A function of batches, such as a network, that has memory for `most` images at a time."""

    def __init__(self, network, most):
        super().__init__()
        self.network = network
        self.most = most

    def forward(self, batch, *t):
        if len(batch) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return self.network(batch, *t)


def refused(sentence, error=UserError):
    """Return a context that must end in this error, whose sentence matches a regular expression."""
    return pytest.raises(error, match=sentence)


@contextmanager
def rights_of_others():
    """Let permissions of files bind this process, which may be root's and so not care for them."""
    libc = ctypes.CDLL(None)
    # The version of capabilities(7), and this thread; then its effective ones, and others.
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    capabilities = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, capabilities) == 0
    effective = capabilities[0]
    # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    capabilities[0] &= ~0b110
    assert libc.capset(header, capabilities) == 0
    yield
    capabilities[0] = effective
    assert libc.capset(header, capabilities) == 0


linux = pytest.mark.skipif(sys.platform != "linux", reason="capabilities and limits of a process")
posix = pytest.mark.skipif(os.name != "posix", reason="signals")


def load_checkpoint(path) -> dict:
    """Return all that a checkpoint holds, so that two can be compared."""
    file = verify_checkpoint(path)
    return {**file.contents, **{part: file.tensors(part) for part in file.digests}}


def newest(run):
    """Return all that the newest checkpoint of a run holds."""
    return load_checkpoint(run_folder.checkpoints_of(run)[-1])


@pytest.fixture(scope="session")
def stopped_run(pictures, tmp_path_factory):
    """Return a tiny run that a signal stopped after step 7 of 10."""
    runs = tmp_path_factory.mktemp("stopped")
    with pytest.raises(SystemExit, match="75"), during(7, terminate):
        train_tiny(pictures, runs)
    return only_in(runs)


@pytest.fixture
def unfinished(stopped_run, tmp_path):
    """Return a copy of `stopped_run`, which has the checkpoints of steps 5 and 7."""
    return shutil.copytree(stopped_run, tmp_path / "runs" / stopped_run.name)


def during(step, act, name="update_ema", owner=train):
    """Return a context in which `act()` precedes the `step`-th call of a function of `owner`."""
    calls = []
    original = getattr(owner, name)

    def acting(*args, **kwargs):
        calls.append(1)
        if len(calls) == step:
            act()
        return original(*args, **kwargs)

    return mock.patch.object(owner, name, acting)


interrupt = mock.Mock(side_effect=KeyboardInterrupt)


def terminate():
    """Send this process the signal that asks it to end."""
    signal.raise_signal(signal.SIGTERM)
