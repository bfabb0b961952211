"""Group norm: against float64."""

import pytest
import torch
import torch.nn.functional as F

from models.group_norm import ChannelsLastNorm, GroupNorm
from tests.conftest import normal


class OnCuda(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True
    is_cpu = False


def output_and_gradients(y, x, weight, bias):
    """Return y and gradients, each for a gradient of y of which each of its terms is a large part.

    Of x there are also the sums over H and W. Where y's gradient has the same sign in all pixels,
    so would errors of the weight's.
    """
    noise = normal(1, *y.shape).to(y.dtype)
    gradient = noise + 0.3 + 0.3 * y.detach()
    gradients = torch.autograd.grad(y, (x, weight, bias), gradient, retain_graph=True)
    sums = gradients[0].sum((2, 3), dtype=torch.float32)
    return [y, *gradients, sums, *torch.autograd.grad(y, weight, 1 + noise)]


@pytest.mark.parametrize(
    "kind, mean",
    [(OnCuda, 0), *((torch.Tensor, mean) for mean in (0, 0.1, 0.6, 2))],
)
def test_in_bfloat16_it_is_near_that_of_float64(kind, mean):
    torch.manual_seed(0)
    norm = GroupNorm(4, 12, 1e-6)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    x = (mean + torch.randn(3, 12, 128, 128)).bfloat16()
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()

    typed = x.as_subclass(kind)
    assert ChannelsLastNorm.is_faster(typed, norm) == (kind is torch.Tensor)
    # Under autocast x is in bfloat16 and the weights are in float32.
    with torch.autocast("cpu", torch.bfloat16):
        found = output_and_gradients(norm(typed), x, *norm.parameters())
    assert [value.dtype for value in found] == [torch.bfloat16] * 2 + [torch.float32] * 4

    inputs = [tensor.detach().double().requires_grad_() for tensor in (x, *norm.parameters())]
    x, weight, bias = inputs
    exact = output_and_gradients(F.group_norm(x, 4, weight, bias, 1e-6), *inputs)
    for value, truth in zip(found, exact, strict=True):
        # bfloat16 has 8 bits, so it rounds by up to 0.4%.
        assert (value.double() - truth).norm() < 0.01 * truth.norm()
