"""A grown network begins with what the small one does at half the size."""

import pytest
import torch
import torch.nn.functional as F

from models.growing import grown_arguments, grown_weights
from models.unet import UNet
from tests.conftest import SMALL_MODEL as SMALL


@torch.no_grad()
def test_the_mean_of_the_grown_output_is_that_of_the_small_network():
    """On squares of 2 x 2, where its first and last convolutions see a finer grid.

    On such squares a kernel k averaged over each square is A k A^T, as its outer rows reach the
    next square from one of two pixels.
    """
    torch.manual_seed(0)
    small = UNet(**SMALL)
    for parameter in small.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    grown = UNet(**grown_arguments(SMALL))
    grown.load_state_dict(grown_weights(small.state_dict(), grown))
    x_t = torch.randn(2, 3, 16, 16)
    t = torch.tensor([3, 700])

    output = F.avg_pool2d(grown(F.interpolate(x_t, scale_factor=2), t), 2)
    fine = torch.tensor([[0.5, 0, 0], [0.5, 1, 0.5], [0, 0, 0.5]])
    for layer in (small.conv_in, small.conv_out):
        layer.weight.copy_(fine @ layer.weight @ fine.T)
    torch.testing.assert_close(output, small(x_t, t), rtol=0, atol=1e-5)


def test_every_weight_of_the_new_level_is_trained_from_the_first_steps():
    """Zeros at its ends must not keep gradients away for ever."""
    torch.manual_seed(0)
    grown = UNet(**grown_arguments(SMALL))
    small = UNet(**SMALL)
    torch.nn.init.normal_(small.conv_out.weight)
    grown.load_state_dict(grown_weights(small.state_dict(), grown))
    optimizer = torch.optim.SGD(grown.parameters(), 0.1)
    for _ in range(2):
        grown(torch.randn(2, 3, 32, 32), torch.tensor([3, 700])).square().mean().backward()
        gradients = {name: p.grad.abs().max() for name, p in grown.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    new = [name for name in gradients if name.startswith(("down.0", "up.2", "up.1.upsample"))]
    # Downsampling, upsampling, two blocks down, and three blocks up with a shortcut
    assert len(new) == 2 + 2 + 2 * 10 + 3 * 12
    assert all(gradients[name] > 0 for name in new)


def test_a_network_whose_first_level_is_wide_does_not_grow():
    with pytest.raises(ValueError, match="begins with 1 grows, not with 2"):
        grown_arguments(SMALL | {"dim_multiply": (2, 2)})
