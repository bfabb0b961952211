"""Where memory runs out: a sentence with the flags that need half of it and change no result."""

import shlex
from pathlib import Path

import pytest
import torch

import train
from functions.support.errors import UserError
from models.unet import UNet
from tests.conftest import call, newest


def limit(patch, most, after=0):
    """Let the network have at most so many images in a call, once it had so many calls."""
    forward = UNet.forward
    calls = []

    def limited(network, x_t, t):
        calls.append(len(x_t))
        if len(calls) > after and len(x_t) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(network, x_t, t)

    patch.setattr(UNet, "forward", limited)


@pytest.mark.slow
def test_the_run_goes_on_with_the_flags_that_the_sentence_gives(tiny_run, trained, monkeypatch):
    """Memory runs out in a step after the first checkpoint; the result is that of another run.

    Afterwards no step, validation or grid has more images in a call than fit.
    """
    with monkeypatch.context() as patch:
        limit(patch, 4, after=9)
        with pytest.raises(UserError, match="out of memory with 8 images at a time") as raised:
            trained()
    sentence, command = str(raised.value).split("; continue with: python train.py ")
    assert sentence.endswith("--diffusion.batch-size 4 --diffusion.gradient-accumulation 2")

    limit(monkeypatch, 4)
    call(train.main, *shlex.split(command))
    run = command.split()[1]
    first = newest(Path(run))
    assert first["run"]["step"] == 10
    second = newest(tiny_run)
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
    batch_size, most, sentence, trained, monkeypatch
):
    limit(monkeypatch, most)
    with pytest.raises(UserError, match=sentence):
        trained("--diffusion.batch-size", batch_size)
