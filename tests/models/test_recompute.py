"""What backward recomputes instead of keeping: the same numbers in less memory, and no convolution twice."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train
from functions.losses import denoising_loss
from functions.noise_scheduler import NoiseScheduler
from models.blocks import ResidualBlock
from models.group_norm import GroupNorm
from models.unet import UNet
from tests.conftest import call, newest, small_unet
from tests.live_bytes import LiveBytes, kept_per_image

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MODES = ["none", "norms", "blocks"]
MIB = 2**20


def network(dropout=0.0):
    """With attention, and upsamplings of both kinds; nothing of it is zero."""
    return small_unet(32, (1, 2, 4), dropout).to(memory_format=torch.channels_last)


class Convolutions(TorchDispatchMode):
    """Counts forward convolutions."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.convolution.default
        return function(*args, **(kwargs or {}))


def gradients(net, mode, dtype=torch.float32, device=CPU):
    """By name, on fixed inputs; and how many convolutions backward repeats."""
    net.set_recompute(mode)
    net.zero_grad()
    x_0, noise = torch.randn(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(3)).to(device)
    t = torch.tensor([0, 300, 999], device=device)
    torch.manual_seed(5)  # dropout
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        loss = denoising_loss(net, NoiseScheduler(1000), x_0, t, noise).sum()
    with Convolutions() as repeated:
        loss.backward()
    # A key's bias shifts all scores of a query alike, which softmax ignores: its gradient is rounding error
    return {
        name: p.grad.cpu() for name, p in net.named_parameters() if "key.bias" not in name
    }, repeated.count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradients_are_the_same_bit_for_bit_and_norms_repeat_no_convolution(dtype):
    net = network(dropout=0.3)
    (kept, none), (of_norms, norms), (of_blocks, blocks) = (
        gradients(net, mode, dtype) for mode in MODES
    )
    for name, value in kept.items():
        assert torch.equal(of_norms[name], value) and torch.equal(of_blocks[name], value), name
    assert none == norms == 0 and blocks > 20  # so the counter counts


def test_in_bfloat16_the_gradients_are_nearly_those_of_float32():
    net = network()
    exact, near = (
        torch.cat([g.flatten() for g in gradients(net, "norms", dtype)[0].values()])
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert 1e-3 < (near - exact).norm() / exact.norm() < 0.02  # measured: 0.008


def test_what_a_block_keeps_is_counted_by_hand():
    """Two parts, 4 and 2 channels, to 4: beside them the state between the convolutions, and what the block returns."""
    N, H, layout = 2, 4, torch.channels_last
    # One channel in float64; the SiLU of the time embedding
    image, small = N * H * H * 8, N * 8 * 8
    norms = 2 * 2 * N * 2 * 8  # mean and rstd of both norms, two groups each
    # Else also concatenation, norms, SiLUs
    for recompute, channels in ((True, 4 + 4), (False, 4 + 4 + 3 * 6 + 2 * 4)):
        block = ResidualBlock(6, 4, 8, 0.0, partial(GroupNorm, 2)).double().to(memory_format=layout)
        block.recompute_norms = recompute
        parts = [
            torch.randn(N, C, H, H).double().contiguous(memory_format=layout).requires_grad_()
            for C in (4, 2)
        ]
        time_embedding = torch.randn(N, 8).double().requires_grad_()
        with LiveBytes() as live:
            y = block(time_embedding, *parts)
        assert live.now == channels * image + small + (0 if recompute else norms)
        del y


@pytest.mark.parametrize(
    ("mode", "least", "most"), [("none", 145, 160), ("norms", 45, 52), ("blocks", 18, 22)]
)
def test_little_is_kept_for_backward_at_the_reference_size(mode, least, most):
    """In bfloat16, an image. Shapes alone count, so the weights get no values."""
    with torch.device("meta"):
        net = UNet(128, 3, 8, [1, 2, 2, 4, 8], [3], 64).to(memory_format=torch.channels_last)
    net.set_recompute(mode)
    assert least * MIB < kept_per_image(net.to_empty(device=CPU), torch.bfloat16) < most * MIB


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", MODES)
def test_on_cuda_the_gradients_are_those_of_the_cpu(mode):
    net = network()
    on_cpu, _ = gradients(net, "none")
    on_gpu, _ = gradients(net.to(CUDA), mode, device=CUDA)
    for name, value in on_gpu.items():
        torch.testing.assert_close(value, on_cpu[name], rtol=2e-2, atol=1e-3)  # tf32 convolutions


def test_another_mode_is_refused():
    with pytest.raises(ValueError, match="recompute is 'norm'; it can be none, norms or blocks"):
        network().set_recompute("norm")


@pytest.mark.slow
def test_a_resumed_run_may_recompute_more(unfinished, tiny_run):
    call(train.main, "--resume", unfinished, "--diffusion.recompute", "blocks")
    torch.testing.assert_close(
        newest(unfinished)["model"], newest(tiny_run)["model"], rtol=0, atol=0
    )
