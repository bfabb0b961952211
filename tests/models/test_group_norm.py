"""The project's group norm against PyTorch's.

Values, gradients and half precision are compared, on each path that it can take.
"""

import pytest
import torch
from torch.autograd import gradcheck

from models.group_norm import GroupNorm

# These are channels, groups and height.
SIZES = [
    (64, 32, 20),
    (96, 12, 17),
    (12, 4, 4),
    # These groups are wide, so PyTorch's code runs.
    (512, 32, 10),
]


def norms(channels, groups):
    """Return ours and PyTorch's, with the same weights, away from 0 and 1."""
    torch.manual_seed(0)
    theirs = torch.nn.GroupNorm(groups, channels, 1e-6)
    torch.nn.init.normal_(theirs.weight)
    torch.nn.init.normal_(theirs.bias)

    # The weights have the same names in both.
    ours = GroupNorm(groups, channels, 1e-6)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def output_and_gradients(norm, x):
    """Return norm(x), and the gradients of x, weight and bias for a fixed gradient of norm(x)."""
    x = x.detach().requires_grad_()
    y = norm(x)
    generator = torch.Generator().manual_seed(1)
    grad_y = torch.randn(y.shape, generator=generator).to(y)
    return [y, *torch.autograd.grad(y, [x, *norm.parameters()], grad_y)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("channels", "groups", "size"), SIZES)
def test_it_is_pytorch_s(channels, groups, size, layout, compiled, monkeypatch):
    # The operations that a compiler would be given are tried, too.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiled)
    ours, theirs = norms(channels, groups)
    x = torch.randn(3, channels, size, size).contiguous(memory_format=layout)

    of_ours = output_and_gradients(ours, x)
    of_theirs = output_and_gradients(theirs, x)

    for value, expected in zip(of_ours, of_theirs, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=2e-5)
    assert ours(x).is_contiguous(memory_format=layout)


def test_the_gradients_are_those_of_finite_differences():
    norm = GroupNorm(2, 6).double()
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)

    # This is the path with a backward pass of its own.
    assert "ChannelsLast" in type(norm(x).grad_fn).__name__

    def function(x, weight, bias):
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x,))

    assert gradcheck(function, (x, weight, bias))


def relative_error(value, exact):
    """Return the size of the error, in units of the exact values' size."""
    error = value.double() - exact
    return (error.norm() / exact.norm()).item()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mean", [0, 4, 16], ids=lambda mean: f"mean {mean} std")
@pytest.mark.parametrize(("channels", "groups", "size"), SIZES)
def test_half_precision_is_as_good_as_pytorch_s(
    channels, groups, size, mean, compiled, monkeypatch
):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiled)
    ours, theirs = norms(channels, groups)
    x = (mean + torch.randn(3, channels, size, size)).bfloat16()
    x = x.contiguous(memory_format=torch.channels_last)

    # x is in bfloat16 and the weights are in float32, as in training.
    with torch.autocast("cpu", torch.bfloat16):
        of_ours = output_and_gradients(ours, x)
        of_theirs = output_and_gradients(theirs, x)

    # Against float64, the errors of ours are near those of PyTorch's.
    in_float64 = output_and_gradients(theirs.double(), x.double())
    for value, reference, exact in zip(of_ours, of_theirs, in_float64, strict=True):
        error_of_theirs = relative_error(reference, exact)
        assert relative_error(value, exact) < max(1.5 * error_of_theirs, 0.006)
        assert value.dtype == reference.dtype
