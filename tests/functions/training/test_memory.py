"""Where memory runs out: a sentence with the flags that need half of it and change no result."""

import re
import shlex

import pytest

import train
from functions.support.errors import UserError
from functions.training.metrics import read_metrics
from models.unet import UNet
from tests.conftest import LittleMemory, call, newest, train_tiny


def limit(patch, most, after=0):
    """Let the network have at most so many images in a call, once it had so many calls."""
    forward = UNet.forward
    calls = []

    def limited(network, x_t, t):
        calls.append(len(x_t))
        if len(calls) <= after:
            return forward(network, x_t, t)
        return LittleMemory(lambda *_: forward(network, x_t, t), most)(x_t, t)

    patch.setattr(UNet, "forward", limited)


def flags_in(sentence):
    return shlex.split(re.search(r"--diffusion.batch-size \d+ \S+ \d+", sentence)[0])


@pytest.mark.slow
def test_the_run_goes_on_with_the_flags_that_the_sentence_gives(pictures, tmp_path, monkeypatch):
    """Memory runs out in a step after the first checkpoint; the result is that of another run."""
    flags = shlex.split("--diffusion.batch-size 4 --diffusion.gradient-accumulation 2")
    with monkeypatch.context() as patch:
        limit(patch, 2, after=26)
        with pytest.raises(UserError, match="out of memory with 4 images at a time") as raised:
            train_tiny(pictures, tmp_path / "little", *flags)

    sentence = str(raised.value)
    (run,) = (tmp_path / "little").iterdir()
    assert f"continue with: python train.py --resume {run} --diffusion.batch-size 2" in sentence
    smaller = flags_in(sentence)
    assert smaller == shlex.split("--diffusion.batch-size 2 --diffusion.gradient-accumulation 4")
    assert newest(run)["run"]["step"] == 5

    call(train.main, "--resume", run, *smaller)
    whole = train_tiny(pictures, tmp_path / "whole", *smaller)
    first, second = newest(run), newest(whole)
    for part in ("model", "ema"):
        for name, weight in first[part].items():
            assert (weight - second[part][name]).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("batch_size", "most", "sentence"),
    [
        (9, 8, r"3 at a time give the same result: --diffusion.batch-size 3 \S+ 3$"),
        (8, 0, r"4 at a time give the same result: --diffusion.batch-size 4 \S+ 2$"),
        (1, 0, "out of memory with one image .*: use a smaller base_dim"),
    ],
)
def test_before_the_first_checkpoint_there_is_nothing_to_resume(
    batch_size, most, sentence, pictures, tmp_path, monkeypatch
):
    limit(monkeypatch, most)
    with pytest.raises(UserError, match=sentence):
        train_tiny(pictures, tmp_path, "--diffusion.batch-size", batch_size)


@pytest.mark.slow
def test_no_call_in_training_has_more_images_than_batch_size(pictures, tmp_path, monkeypatch):
    """This holds for steps, validation and grids."""
    limit(monkeypatch, 2)
    flags = "--diffusion.batch-size 2 --diffusion.epochs 1 --diffusion.validate-every 9"
    run = train_tiny(pictures, tmp_path, *flags.split())
    assert read_metrics(run / "metrics.csv")[-1]["val_loss"] > 0
    assert list(run.glob("samples/*.png"))


def test_another_error_is_raised_as_it_is(pictures, tmp_path, monkeypatch):
    def forward(network, x_t, t):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(UNet, "forward", forward)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        train_tiny(pictures, tmp_path)
