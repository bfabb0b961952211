"""Where memory runs out, half of the images at a time give the same result."""

import pytest
import torch

import train
from models.unet import UNet
from tests.conftest import call, newest, only_in


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
def test_a_run_that_is_out_of_memory_goes_on_with_half_of_the_images(
    tiny_run, trained, tmp_path, monkeypatch
):
    """Memory runs out in a step after the first checkpoint; the result is that of another run.

    Afterwards no step, validation or grid has more images in a call than fit.
    """
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        limit(patch, 4, after=9)
        trained()
    limit(monkeypatch, 4)
    half = "--diffusion.batch-size 4 --diffusion.gradient-accumulation 2"
    call(train, "--resume", only_in(tmp_path), half)
    averages = (newest(run)["ema"] for run in (only_in(tmp_path), tiny_run))
    torch.testing.assert_close(*averages, rtol=0, atol=1e-4)
