"""Where memory runs out, half of the images at a time give the same result."""

from unittest.mock import Mock

import pytest
import torch

import train
from models.unet import UNet
from tests.conftest import call, during, newest, only_in


@pytest.mark.slow
def test_a_run_that_is_out_of_memory_goes_on_with_half_of_the_images(
    tiny_run, trained, tmp_path, monkeypatch
):
    """Memory runs out in a step after the first checkpoint; the result is that of another run.

    Afterwards no step, validation or grid has more images in a call than fit.
    """
    out_of_memory = Mock(side_effect=torch.OutOfMemoryError)
    with during(8, out_of_memory, "denoising_loss"), pytest.raises(torch.OutOfMemoryError):
        trained()
    forward = UNet.forward

    def limited(network, x_t, t):
        assert len(x_t) <= 4
        return forward(network, x_t, t)

    monkeypatch.setattr(UNet, "forward", limited)
    half = "--diffusion.batch-size 4 --diffusion.gradient-accumulation 2"
    call(train, "--resume", only_in(tmp_path), half)
    averages = (newest(run)["ema"] for run in (only_in(tmp_path), tiny_run))
    torch.testing.assert_close(*averages, rtol=0, atol=1e-4)
