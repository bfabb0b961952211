"""A grown network begins with what the small one does at half the size."""

import pytest
import torch
import torch.nn.functional as F

from models.growing import grown_arguments, grown_weights
from models.unet import UNet
from tests.conftest import SMALL_MODEL as SMALL


@pytest.fixture
def both():
    """Return a network whose output is not zero, and what grows out of it."""
    torch.manual_seed(0)
    small = UNet(**SMALL)
    for parameter in small.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    grown = UNet(**grown_arguments(SMALL))
    grown.load_state_dict(grown_weights(small.state_dict(), grown))
    return small, grown


@torch.no_grad()
def test_the_mean_of_the_grown_output_is_that_of_the_small_network(both):
    """On squares of 2 x 2, where its first and last convolutions see a finer grid.

    On such squares a kernel k averaged over each square is A k A^T, as its outer rows reach the
    next square from one of two pixels.
    """
    small, grown = both
    x_t = torch.randn(2, 3, 16, 16)
    t = torch.tensor([3, 700])
    output = F.avg_pool2d(grown(F.interpolate(x_t, scale_factor=2), t), 2)
    fine = torch.tensor([[0.5, 0, 0], [0.5, 1, 0.5], [0, 0, 0.5]])
    for layer in (small.conv_in, small.conv_out):
        layer.weight.copy_(fine @ layer.weight @ fine.T)
    torch.testing.assert_close(output, small(x_t, t), rtol=0, atol=1e-5)


def test_every_weight_of_the_new_level_is_trained_from_the_first_steps(both):
    """Zeros at its ends must not keep gradients away for ever."""
    _, grown = both
    optimizer = torch.optim.SGD(grown.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        grown(torch.randn(2, 3, 32, 32), torch.tensor([3, 700])).square().mean().backward()
        optimizer.step()
    level = ("down.0", "up.2", "up.1.upsample")
    new = [p for name, p in grown.named_parameters() if name.startswith(level)]
    # Downsampling, upsampling, two blocks down, and three blocks up with a shortcut
    assert len(new) == 2 + 2 + 2 * 10 + 3 * 12
    assert all(p.grad.any() for p in new)


def test_a_network_whose_first_level_is_wide_does_not_grow():
    with pytest.raises(ValueError, match="begins with 1 grows, not with 2"):
        grown_arguments(SMALL | {"dim_multiply": (2, 2)})
