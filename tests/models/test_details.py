"""The network that draws details."""

import pytest
import torch
from torch.testing import assert_close

from config import EXPERIMENTS, build_network
from models.details import DetailsUNet
from tests.conftest import normal

T = torch.tensor([3, 700])


@pytest.fixture(scope="module")
def network():
    """Return a small network whose output is not zero."""
    torch.manual_seed(0)
    network = DetailsUNet(16, 3, 4, (1, 2, 2), (), 8, norm_groups=2)
    for parameter in network.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return network


def test_the_preset_has_the_parameters_that_the_readme_says():
    """A U-Net of blocks, counted by hand, with five channels in and four out for each colour."""
    network = build_network(EXPERIMENTS["ffhq-details"].model)
    assert isinstance(network, DetailsUNet)
    dims, time = (64, 128, 192), 256

    def block(a, b):
        shortcut = a * b + b if a != b else 0
        return 2 * a + (9 * a * b + b) + (time * b + b) + 2 * b + (9 * b * b + b) + shortcut

    conv = [9 * dim * dim + dim for dim in dims]
    down = block(64, 64) * 2 + block(64, 128) + block(128, 128) + block(128, 192) + block(192, 192)
    middle = 2 * block(192, 192) + 2 * 192 + 4 * (192 * 192 + 192)
    # Skips, from the last: 192, 192, 128 (halved), 128, 128, 64 (halved), 64, 64, 64 (first)
    up = block(384, 192) * 2 + block(320, 192)
    up += block(192 + 128, 128) + block(256, 128) + block(128 + 64, 128)
    up += block(128 + 64, 64) + block(128, 64) * 2
    ends = (9 * 15 * 64 + 64) + 2 * 64 + (9 * 64 * 12 + 12)
    embedding = (64 * time + time) + (time * time + time)
    count = down + middle + up + ends + embedding + conv[0] + 2 * conv[1] + conv[2]
    assert sum(p.numel() for p in network.parameters()) == count


@pytest.mark.parametrize("height, width", [(16, 16), (18, 30), (2, 6), (64, 40)])
def test_images_of_any_even_size_have_details(network, height, width):
    x, low = normal(0, 2, 3, height, width), normal(1, 2, 3, height // 2, width // 2)
    output = network(x, T, low)
    assert output.shape == x.shape
    # What it is given decides them, as t does.
    for other in (network(x, T, 0 * low), network(x, T.flip(0), low), network(0 * x, T, low)):
        assert (output - other).abs().mean() > 1e-3


def test_each_pixel_of_a_new_network_is_zero_and_gets_a_gradient():
    torch.manual_seed(0)
    network = DetailsUNet(16, 3, 8, (1, 2), (), 8, norm_groups=2)
    x, low = normal(0, 2, 3, 16, 16), normal(1, 2, 3, 8, 8)
    output = network(x, T, low)
    assert_close(output, torch.zeros_like(x))
    (output - x).square().mean().backward()
    assert network.conv_out.weight.grad.abs().min() > 0
