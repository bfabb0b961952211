"""What backward recomputes instead of keeping.

It gives the same numbers in less memory, and repeats no convolution for norms.
"""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train
from config import EXPERIMENTS
from functions.losses import denoising_loss
from functions.noise_scheduler import NoiseScheduler
from models.blocks import ResidualBlock
from models.group_norm import GroupNorm
from models.unet import UNet
from tests.conftest import ROOT, call, newest, small_unet
from tests.live_bytes import LiveBytes, kept_per_image, memory_row

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
MODES = ["none", "norms"]
MIB = 2**20


def network(dropout=0.0):
    """Return a network with attention and upsamplings of both kinds; nothing of it is zero."""
    return small_unet(32, (1, 2, 4), dropout).to(memory_format=torch.channels_last)


class Convolutions(TorchDispatchMode):
    """Counts forward convolutions."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.convolution.default
        return function(*args, **(kwargs or {}))


def gradients(net, mode, dtype=torch.float32, device=CPU):
    """Return the gradients by name on fixed inputs, and how many convolutions backward repeats."""
    net.set_recompute(mode)
    net.zero_grad()
    generator = torch.Generator().manual_seed(3)
    x_0, noise = torch.randn(2, 3, 3, 32, 32, generator=generator).to(device)
    t = torch.tensor([0, 300, 999], device=device)

    # Dropout draws from the global generator.
    torch.manual_seed(5)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    with autocast, Convolutions() as called:
        loss = denoising_loss(net, NoiseScheduler(1000), x_0, t, noise).sum()
    with Convolutions() as repeated:
        loss.backward()
    # This shows that the counter counts.
    assert called.count > 20

    # A key's bias shifts all scores of a query alike, which softmax ignores. Its gradient is
    # nothing but rounding error, so it is left out.
    by_name = {}
    for name, parameter in net.named_parameters():
        if "key.bias" not in name:
            by_name[name] = parameter.grad.cpu()
    return by_name, repeated.count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradients_are_the_same_bit_for_bit_and_norms_repeat_no_convolution(dtype):
    net = network(dropout=0.3)
    kept, repeated_by_none = gradients(net, "none", dtype)
    of_norms, repeated_by_norms = gradients(net, "norms", dtype)

    for name, gradient in kept.items():
        assert torch.equal(of_norms[name], gradient), name
    assert repeated_by_none == 0
    assert repeated_by_norms == 0


def test_in_bfloat16_the_gradients_are_nearly_those_of_float32():
    net = network()

    def all_gradients(dtype):
        by_name, _ = gradients(net, "norms", dtype)
        return torch.cat([gradient.flatten() for gradient in by_name.values()])

    exact = all_gradients(torch.float32)
    error = all_gradients(torch.bfloat16) - exact
    # It was measured as 0.008. An error of 0 would mean that nothing ran in bfloat16.
    assert 1e-3 < error.norm() / exact.norm() < 0.02


@pytest.mark.parametrize("recompute", [True, False])
def test_what_a_block_keeps_is_counted_by_hand(recompute):
    N = 2
    H = 4
    block = ResidualBlock(6, 4, 8, 0.0, partial(GroupNorm, 2))
    block = block.double().to(memory_format=torch.channels_last)
    block.recompute_norms = recompute

    # The 6 channels of the input come in two parts.
    parts = []
    for C in (4, 2):
        part = torch.randn(N, C, H, H).double()
        part = part.contiguous(memory_format=torch.channels_last)
        parts.append(part.requires_grad_())
    time_embedding = torch.randn(N, 8).double().requires_grad_()

    with LiveBytes() as live:
        # The name keeps the output alive, so it counts.
        y = block(time_embedding, *parts)

    # The state between the convolutions and the output have 4 channels each, and the SiLU of the
    # time embedding has 8 values an image.
    expected = (4 + 4) * N * H * H + N * 8
    if not recompute:
        # The first layer keeps the concatenation, a norm and a SiLU of 6 channels; the second one
        # keeps a norm and a SiLU of 4.
        expected += (3 * 6 + 2 * 4) * N * H * H
        # Both norms keep mean and 1 / std of two groups.
        expected += 2 * 2 * N * 2
    # All is in float64, so a value takes 8 bytes.
    assert live.now == 8 * expected
    del y


@pytest.mark.parametrize(("mode", "least", "most"), [("none", 145, 160), ("norms", 45, 52)])
def test_little_is_kept_for_backward_at_the_reference_size(mode, least, most):
    # Shapes alone count, so the weights get no values.
    with torch.device("meta"):
        net = UNet(128, 3, 8, [1, 2, 2, 4, 8], [3], 64)
    net.to(memory_format=torch.channels_last).set_recompute(mode)

    # These are MiB an image, in bfloat16.
    kept = kept_per_image(net.to_empty(device=CPU), torch.bfloat16)
    assert least * MIB < kept < most * MIB


def test_the_peak_is_the_most_that_is_alive_at_once():
    with LiveBytes() as live:
        x = torch.zeros(10)
        y = x + 1
        del x
        z = y + 1
    # Each has 40 bytes, and at most two of them are alive.
    assert (live.now, live.peak) == (80, 80)
    del y, z
    assert (live.now, live.peak) == (0, 80)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["faces-quick", "ffhq-v"])
def test_the_table_of_memory_is_that_of_todays_network(name):
    table = (ROOT / "docs" / "speed.md").read_text().splitlines()
    assert memory_row(name, EXPERIMENTS[name]) in table


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", MODES)
def test_on_cuda_the_gradients_are_those_of_the_cpu(mode):
    net = network()
    on_cpu, _ = gradients(net, "none")
    on_gpu, _ = gradients(net.to(CUDA), mode, device=CUDA)

    # The tolerance is wide because convolutions may run in TF32.
    for name, gradient in on_gpu.items():
        torch.testing.assert_close(gradient, on_cpu[name], rtol=2e-2, atol=1e-3)


def test_another_mode_is_refused():
    with pytest.raises(ValueError, match="recompute is 'norm'; it can be none or norms"):
        network().set_recompute("norm")


@pytest.mark.slow
def test_a_resumed_run_may_recompute_less(unfinished, tiny_run):
    call(train.main, "--resume", unfinished, "--diffusion.recompute", "none")

    resumed = newest(unfinished)["model"]
    uninterrupted = newest(tiny_run)["model"]
    torch.testing.assert_close(resumed, uninterrupted, rtol=0, atol=0)
