"""The table of memory in docs/speed.md: how it is counted, and that it is that of today's code."""

from functools import partial
from unittest import mock

import pytest
import torch

from config import EXPERIMENTS
from models.blocks import GroupNorm, ResidualBlock
from tests.conftest import ROOT
from tests.live_bytes import LiveBytes, memory_row, norm_of_cuda


def test_what_a_block_keeps_is_counted_by_hand():
    N = 2
    H = 4
    block = ResidualBlock(6, 4, 8, 0.0, partial(GroupNorm, 2))
    block = block.double().to(memory_format=torch.channels_last)
    x = torch.randn(N, 6, H, H).double().contiguous(memory_format=torch.channels_last)
    time_embedding = torch.randn(N, 8).double().requires_grad_()

    with mock.patch.object(GroupNorm, "forward", norm_of_cuda), LiveBytes() as live:
        # The name keeps the output alive, so it counts.
        y = block(x.requires_grad_(), time_embedding)

    # A layer keeps the norm's copy of its input, the norm and the SiLU: 6 channels in the first
    # one, and 4 in the second. The output has 4 channels, the SiLU of the time embedding has 8
    # values an image, and both norms keep mean and 1 / std of two groups.
    expected = (3 * 6 + 3 * 4 + 4) * N * H * H + N * 8 + 2 * 2 * N * 2
    # All is in float64, so a value takes 8 bytes.
    assert live.now == 8 * expected
    del y
    assert live.peak > live.now


@pytest.mark.slow
def test_the_table_is_that_of_todays_network():
    table = (ROOT / "docs" / "speed.md").read_text().splitlines()
    assert memory_row("faces-quick", EXPERIMENTS["faces-quick"]) in table
