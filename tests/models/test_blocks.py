"""models/blocks.py: group norm on CUDA, against float64. test_unet.py has the other parts."""

import torch
import torch.nn.functional as F

from models.blocks import GroupNorm
from tests.conftest import normal


class OnCuda(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True


def output_and_gradients(y, *inputs):
    """Return y and gradients, each for a gradient of y of which each of its terms is a large part.

    Where y's gradient has the same sign in all pixels, so would errors of the weight's.
    """
    gradient = normal(1, *y.shape).to(y.dtype) + 0.3 + 0.3 * y.detach()
    return [y, *torch.autograd.grad(y, inputs, gradient)]


def test_group_norm_of_bfloat16_on_cuda_is_bfloat16_and_near_that_of_float64():
    norm = GroupNorm(4, 12, 1e-6)
    with torch.no_grad():
        norm.weight.copy_(normal(2, 12))
        norm.bias.copy_(normal(3, 12))
    x = (0.6 + normal(0, 3, 12, 32, 32)).bfloat16().requires_grad_()
    # Under autocast x is in bfloat16 and the weights are in float32.
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x.as_subclass(OnCuda))
    found = output_and_gradients(y, x, *norm.parameters())
    assert [value.dtype for value in found] == [torch.bfloat16] * 2 + [torch.float32] * 2

    inputs = [tensor.detach().double().requires_grad_() for tensor in (x, *norm.parameters())]
    exact = output_and_gradients(F.group_norm(inputs[0], 4, *inputs[1:], 1e-6), *inputs)
    for value, truth in zip(found, exact, strict=True):
        # bfloat16 has 8 bits, so it rounds by up to 0.4%.
        assert (value.double() - truth).norm() < 0.01 * truth.norm()
