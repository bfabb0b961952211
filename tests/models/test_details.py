"""The network that draws details."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from config import EXPERIMENTS
from models.details import DetailsUNet
from models.networks import build_network
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


def test_a_preset_with_details_has_a_unet_whose_ends_have_other_channels():
    """test_unet.py counts the parameters of a U-Net. Here five images come in, and four out."""
    model = EXPERIMENTS["ffhq-details"].model
    ours, plain = build_network(model), build_network(replace(model, network="unet"))
    counts = [sum(p.numel() for p in network.parameters()) for network in (ours, plain)]
    # Twelve channels more come in, and nine more out, each out of these with a bias.
    assert counts[0] - counts[1] == 9 * 12 * 64 + (9 * 64 + 1) * 9
    assert isinstance(ours, DetailsUNet)


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
