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


def output_and_gradients(y, *inputs):
    """Return y, the gradients of the inputs, and the sums of the first one over H and W.

    For this gradient of y, each of its terms is a large part of it.
    """
    noise = normal(1, *y.shape).to(y.dtype)
    gradients = torch.autograd.grad(y, inputs, noise + 0.3 + 0.3 * y.detach())
    return [y, *gradients, gradients[0].sum((2, 3), dtype=torch.float32)]


@pytest.mark.parametrize("kind", [torch.Tensor, OnCuda])
@pytest.mark.parametrize("mean", [0, 2])
@pytest.mark.parametrize("channels, groups", [(64, 32), (12, 4)])
def test_in_bfloat16_it_is_near_that_of_float64(channels, groups, mean, kind):
    torch.manual_seed(0)
    norm = GroupNorm(groups, channels, 1e-6)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    x = (mean + torch.randn(3, channels, 128, 128)).bfloat16()
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()

    typed = x.as_subclass(kind)
    assert ChannelsLastNorm.is_faster(typed, norm) == (kind is torch.Tensor)
    # Under autocast x is in bfloat16 and the weights are in float32.
    with torch.autocast("cpu", torch.bfloat16):
        found = output_and_gradients(norm(typed), x, *norm.parameters())
    assert [value.dtype for value in found] == [torch.bfloat16] * 2 + [torch.float32] * 3

    inputs = [tensor.detach().double().requires_grad_() for tensor in (x, *norm.parameters())]
    x, weight, bias = inputs
    exact = output_and_gradients(F.group_norm(x, groups, weight, bias, 1e-6), *inputs)
    for value, truth in zip(found, exact, strict=True):
        # bfloat16 has 8 bits, so it rounds by up to 0.4%.
        assert (value.double() - truth).norm() < 0.01 * truth.norm()


@pytest.mark.parametrize("mean", [0, 0.1, 0.3, 0.6, 0.9, 2])
def test_no_error_of_the_weights_gradient_adds_up_over_the_pixels(mean):
    torch.manual_seed(0)
    norm = GroupNorm(32, 64, 1e-6)
    x = (mean + torch.randn(3, 64, 128, 128)).bfloat16()
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    # Where the gradient has the same sign, so would the errors.
    grad = (1 + torch.randn_like(x)).detach()
    with torch.autocast("cpu", torch.bfloat16):
        norm(x).backward(grad)
    exact = torch.nn.GroupNorm(32, 64, 1e-6).double()
    exact(x.detach().double()).backward(grad.double())

    error = norm.weight.grad.double() - exact.weight.grad
    assert error.norm() < 0.01 * exact.weight.grad.norm()
