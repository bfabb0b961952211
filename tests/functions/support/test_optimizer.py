"""Adam in memory order: PyTorch's numbers, without copies of weights."""

import pytest
import torch
from torch.testing import assert_close

from functions.support.device import Adam

LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adam_in_memory_order_is_pytorchs(dtype):
    """Steps on weights in channels_last, some of them skipped, against the plain Adam on contiguous ones."""
    torch.manual_seed(0)
    start = [torch.randn(8, 6, 3, 3, dtype=dtype), torch.randn(8, 6, 1, 1, dtype=dtype), torch.randn(8, dtype=dtype)]
    found = {}
    for kind, layout in ((Adam, torch.channels_last), (torch.optim.Adam, torch.contiguous_format)):
        parameters = [t.clone().contiguous(memory_format=layout if t.dim() == 4 else torch.contiguous_format)
                      .requires_grad_() for t in start]  # fmt: skip
        optimizer = kind(parameters, lr=0.1, fused=True)
        for step in range(5):
            for parameter in parameters:
                parameter.grad = torch.sin(parameter.detach() * (step + 1))
            optimizer.found_inf = torch.tensor(float(step == 2))
            optimizer.step()
        moments = [optimizer.state[parameter]["exp_avg_sq"] for parameter in parameters]
        assert all(moment.shape == parameter.shape for moment, parameter in zip(moments, parameters, strict=True))
        found[kind] = parameters + moments
    for ours, theirs in zip(*found.values(), strict=True):
        assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_adam_copies_no_weights():
    """On weights in channels_last it copies no more than PyTorch's does on contiguous ones."""
    copied = {}
    for kind, layout in ((Adam, LAYOUTS[1]), (torch.optim.Adam, LAYOUTS[1]), (torch.optim.Adam, LAYOUTS[0])):
        weight = torch.randn(8, 6, 3, 3).contiguous(memory_format=layout).requires_grad_()
        weight.grad = torch.ones_like(weight)
        optimizer = kind([weight], lr=0.1, fused=True)
        optimizer.step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            optimizer.step()
        copied[kind, layout] = sum(event.count for event in profile.key_averages() if event.key == "aten::copy_")
    least = copied[torch.optim.Adam, LAYOUTS[0]]
    assert copied[Adam, LAYOUTS[1]] == least
    assert copied[torch.optim.Adam, LAYOUTS[1]] > least  # when this fails, PyTorch has mended it, and ours can go
