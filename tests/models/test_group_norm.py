"""The own group norm against PyTorch's: values, gradients, half precision, and where it takes which path."""

import pytest
import torch
from torch.autograd import gradcheck

from models.group_norm import GroupNorm

# Channels, groups, height; the last has wide groups
SIZES = [(64, 32, 20), (96, 12, 17), (12, 4, 4), (512, 32, 10)]


def norms(channels, groups):
    """Ours and PyTorch's, with the same weights, away from 0 and 1."""
    torch.manual_seed(0)
    theirs, ours = torch.nn.GroupNorm(groups, channels, 1e-6), GroupNorm(groups, channels, 1e-6)
    torch.nn.init.normal_(theirs.weight)
    torch.nn.init.normal_(theirs.bias)
    ours.load_state_dict(theirs.state_dict())  # under the same names
    return ours, theirs


def output_and_gradients(norm, x):
    x = x.detach().requires_grad_()
    y = norm(x)
    seen = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y, *torch.autograd.grad(y, [x, *norm.parameters()], seen)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("channels", "groups", "size"), SIZES)
def test_it_is_pytorch_s(channels, groups, size, layout, compiled, monkeypatch):
    """Also by the operations that a compiler is given."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiled)
    ours, theirs = norms(channels, groups)
    x = torch.randn(3, channels, size, size).contiguous(memory_format=layout)
    for found, expected in zip(
        output_and_gradients(ours, x), output_and_gradients(theirs, x), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
    assert ours(x).is_contiguous(memory_format=layout)


def test_the_gradients_are_those_of_finite_differences():
    norm = GroupNorm(2, 6).double()
    x = (
        torch.randn(2, 6, 4, 4, dtype=torch.float64)
        .contiguous(memory_format=torch.channels_last)
        .requires_grad_()
    )
    assert "ChannelsLast" in type(norm(x).grad_fn).__name__
    function = lambda x, weight, bias: torch.func.functional_call(
        norm, {"weight": weight, "bias": bias}, (x,)
    )
    assert gradcheck(
        function, (x, *(torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2)))
    )


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mean", [0, 4, 16], ids=lambda mean: f"mean {mean} std")
@pytest.mark.parametrize(("channels", "groups", "size"), SIZES)
def test_half_precision_is_as_good_as_pytorch_s(
    channels, groups, size, mean, compiled, monkeypatch
):
    """In bfloat16 beside float32 weights, against float64: its errors are near those of PyTorch's."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiled)
    ours, theirs = norms(channels, groups)
    x = (
        (mean + torch.randn(3, channels, size, size))
        .bfloat16()
        .contiguous(memory_format=torch.channels_last)
    )
    with torch.autocast("cpu", torch.bfloat16):
        halves = output_and_gradients(ours, x), output_and_gradients(theirs, x)
    exact = output_and_gradients(theirs.double(), x.double())
    for found, expected, truth in zip(*halves, exact, strict=True):
        error = lambda value, truth=truth: ((value.double() - truth).norm() / truth.norm()).item()
        assert error(found) < max(1.5 * error(expected), 0.006)
        assert found.dtype == expected.dtype
