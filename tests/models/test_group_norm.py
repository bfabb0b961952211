"""The group norm of CUDA, which computes in the dtype of its input: its arithmetic, on a CPU."""

import pytest
import torch
import torch.nn.functional as F

from models.blocks import GroupNorm


class OnCuda(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True


def output_and_gradients(norm, x, weight, bias):
    """Return norm(x), and the gradients of x, weight and bias for a fixed gradient of norm(x)."""
    generator = torch.Generator().manual_seed(1)
    y = norm(x)
    grad_y = torch.randn(y.shape, generator=generator).to(y.dtype)
    return [y, *torch.autograd.grad(y, [x, weight, bias], grad_y)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mean", [0, 2], ids=lambda mean: f"mean {mean} std")
@pytest.mark.parametrize(("channels", "groups", "size"), [(64, 32, 20), (12, 4, 4), (512, 32, 10)])
def test_in_bfloat16_it_is_near_that_of_float64(
    channels, groups, size, mean, compiled, monkeypatch
):
    # What a compiler would be given is tried, too.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiled)
    torch.manual_seed(0)
    norm = GroupNorm(groups, channels, 1e-6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = (mean + torch.randn(3, channels, size, size)).bfloat16()
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()

    # Under autocast x is in bfloat16 and the weights are in float32.
    with torch.autocast("cpu", torch.bfloat16):
        found = output_and_gradients(lambda x: norm(x.as_subclass(OnCuda)), x, *norm.parameters())
    assert [value.dtype for value in found] == [torch.bfloat16] * 2 + [torch.float32] * 2

    exact_x = x.detach().double().requires_grad_()
    weight, bias = (parameter.detach().double() for parameter in norm.parameters())
    arguments = weight.requires_grad_(), bias.requires_grad_()
    exact = output_and_gradients(
        lambda x: F.group_norm(x, groups, *arguments, 1e-6), exact_x, *arguments
    )
    for value, truth in zip(found, exact, strict=True):
        # bfloat16 has 8 bits, so it rounds by up to 0.4%.
        assert (value.double() - truth).norm() < 0.01 * truth.norm()
