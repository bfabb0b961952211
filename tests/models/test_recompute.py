"""What backward recomputes instead of keeping: the same numbers in less memory, and no convolution twice."""

import copy

import pytest
import torch
from diffusers import UNet2DModel
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import train
from functions.losses import noise_prediction_loss
from functions.noise_scheduler import NoiseScheduler
from models.blocks import ResidualBlock
from models.group_norm import GroupNorm
from models.unet import UNet
from tests.conftest import TINY, call, newest
from tests.live_bytes import LiveBytes, kept_per_image
from tests.models.test_unet import PAPER, diffusers_twin

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MODES = ["none", "norms", "blocks"]
MIB = 2**20


def network(dropout=0.0, layout=torch.channels_last, size=32, seed=0):
    """With attention, and upsamplings of both kinds; nothing of it is zero."""
    torch.manual_seed(seed)
    net = UNet(size, 3, size // 4, [1, 2, 4], [1], 16, dropout, norm_groups=4)
    for parameter in net.parameters():
        parameter.data.add_(0.03 * torch.randn_like(parameter))
    return net.to(memory_format=layout)


def loss_of(net, dtype=torch.float32, device=CPU):
    """On fixed inputs."""
    generator = torch.Generator().manual_seed(3)
    x_0, noise = (torch.randn(3, 3, 32, 32, generator=generator).to(device) for _ in range(2))
    t = torch.tensor([0, 300, 999], device=device)
    torch.manual_seed(5)  # dropout
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        return noise_prediction_loss(net, NoiseScheduler(1000), x_0, t, noise).sum()


def gradients(net, dtype=torch.float32, device=CPU):
    """Without the keys' biases, whose gradients are rounding errors (see test_unet)."""
    net.zero_grad()
    loss_of(net, dtype, device).backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if "key.bias" not in name}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_gradients_are_the_same_bit_for_bit(dropout, dtype):
    found, net = {}, network(dropout)
    for mode in MODES:
        net.set_recompute(mode)
        found[mode] = gradients(net, dtype)
    for name in found["none"]:
        assert torch.equal(found["none"][name], found["norms"][name]), name
        assert torch.equal(found["none"][name], found["blocks"][name]), name


def test_the_fast_layout_has_the_gradients_of_pytorch_s_own_layers():
    """Contiguous tensors go through PyTorch's group norm; channels_last through ours."""
    fast, plain = gradients(network()), gradients(network(layout=torch.contiguous_format))
    for name, value in fast.items():
        assert_close(value, plain[name], rtol=1e-3, atol=2e-5)


def test_in_half_precision_the_own_norm_is_as_near_to_the_truth(monkeypatch):
    """Gradients in bfloat16 beside those with PyTorch's norm: the mean over three networks of their relative errors."""
    halves = [gradients(network(seed=seed), torch.bfloat16) for seed in range(3)]
    monkeypatch.setattr(GroupNorm, "forward", torch.nn.GroupNorm.forward)
    plain = [gradients(network(seed=seed), torch.bfloat16) for seed in range(3)]
    truth = [gradients(network(seed=seed)) for seed in range(3)]
    error = lambda found: sum(
        ((f[name] - t[name]).norm() / t[name].norm()).item() / len(t) / 3
        for f, t in zip(found, truth, strict=True) for name in t
    )  # fmt: skip
    assert error(halves) < 1.1 * error(plain)
    assert error(halves) < 0.05


def test_a_short_training_curve_in_bfloat16_is_that_of_pytorch_s_layers_in_float32():
    def curve(net, dtype):
        optimizer, generator, losses = torch.optim.Adam(net.parameters(), 2e-3), torch.Generator().manual_seed(0), []
        colours = torch.rand(8, 3, 1, 1, generator=generator) * 2 - 1
        for _ in range(60):
            t = torch.randint(0, 1000, (8,), generator=generator)
            noise = torch.randn(8, 3, 16, 16, generator=generator)
            with torch.autocast(CPU.type, dtype, enabled=dtype != torch.float32):
                loss = noise_prediction_loss(net, NoiseScheduler(1000), colours.expand(8, 3, 16, 16), t, noise).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return torch.tensor(losses)

    torch.manual_seed(0)
    net = UNet(16, 3, 8, [1, 2], [1], 16, norm_groups=4)
    plain = curve(copy.deepcopy(net), torch.float32)
    assert plain[-10:].mean() < 0.5 * plain[:10].mean()  # it learns, so there is something to compare
    net = net.to(memory_format=torch.channels_last)
    net.set_recompute("norms")
    assert_close(curve(copy.deepcopy(net), torch.float32), plain, rtol=0.01, atol=0.002)
    assert_close(curve(net, torch.bfloat16), plain, rtol=0.1, atol=0.03)


class Convolutions(TorchDispatchMode):
    """Counts forward convolutions."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.convolution.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_alone_are_recomputed_and_no_convolution(dtype):
    repeated = {}
    for mode in MODES:
        net = network()
        net.set_recompute(mode)
        loss = loss_of(net, dtype)
        with Convolutions() as repeated[mode]:
            loss.backward()
    assert repeated["none"].count == repeated["norms"].count == 0
    assert repeated["blocks"].count > 20  # so the counter counts


def test_what_a_block_keeps_is_counted_by_hand():
    """Two parts, 4 and 2 channels, to 4: beside them the state between the convolutions, and what the block returns."""
    N, H, layout = 2, 4, torch.channels_last
    image, small = N * H * H * 8, N * 8 * 8  # one channel in float64; the SiLU of the time embedding
    norms = 2 * 2 * N * 2 * 8  # mean and rstd of both norms, two groups each
    for recompute, channels in ((True, 4 + 4), (False, 4 + 4 + 3 * 6 + 2 * 4)):  # else also concatenation, norms, SiLUs
        block = ResidualBlock(6, 4, 8, 0.0, 2).double().to(memory_format=layout)
        block.recompute_norms = recompute
        parts = [torch.randn(N, C, H, H).double().contiguous(memory_format=layout).requires_grad_() for C in (4, 2)]
        time_embedding = torch.randn(N, 8).double().requires_grad_()
        with LiveBytes() as live:
            y = block(time_embedding, *parts)
        assert live.now == channels * image + small + (0 if recompute else norms)
        del y


class Peer(torch.nn.Module):
    """diffusers' network as `kept_per_image` calls ours."""

    def __init__(self, net: UNet2DModel):
        super().__init__()
        self.net, self.channels, self.image_size = net, 3, 128

    def forward(self, x_t, t):
        return self.net(x_t, t, return_dict=False)[0]


def test_little_is_kept_for_backward_at_the_reference_size():
    """In bfloat16, beside diffusers' equal network, so that no gain is lost unseen."""
    config = {**PAPER["reference"][0], "norm_groups": 32}
    net, kept = UNet(channels=3, **config).to(memory_format=torch.channels_last), {}
    for mode in MODES:
        net.set_recompute(mode)
        kept[mode] = kept_per_image(net, torch.bfloat16)
    theirs = kept_per_image(Peer(diffusers_twin(config)), torch.bfloat16)
    assert kept["norms"] <= 52 * MIB
    assert kept["blocks"] <= 22 * MIB
    assert 0.8 * theirs < kept["none"] < theirs


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", MODES)
def test_on_cuda_as_much_is_kept_as_is_counted(mode):
    net = network(size=128).to(CUDA)
    net.set_recompute(mode)

    def allocated(images):
        x_0, noise = (torch.randn(images, 3, 128, 128, device=CUDA) for _ in range(2))
        t = torch.zeros(images, dtype=torch.int64, device=CUDA)
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16):
            loss = noise_prediction_loss(net, NoiseScheduler(1000), x_0, t, noise).sum()
        kept = torch.cuda.memory_allocated() - before
        del loss
        return kept

    allocated(1)
    assert (allocated(12) - allocated(4)) / 8 == pytest.approx(kept_per_image(net, torch.bfloat16), rel=0.05)


def test_another_mode_is_refused():
    with pytest.raises(ValueError, match="recompute is 'norm'; it can be none, norms or blocks"):
        network().set_recompute("norm")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", MODES)
def test_on_cuda_the_gradients_are_those_of_the_cpu(mode):
    net = network()
    on_cpu = gradients(net)
    net = net.to(CUDA)
    net.set_recompute(mode)
    for name, value in gradients(net, device=CUDA).items():
        assert_close(value.cpu(), on_cpu[name], rtol=2e-2, atol=1e-3)  # tf32 convolutions


def test_runs_with_every_kind_of_recomputation_end_alike(pictures, tmp_path):
    runs = {}
    for mode in MODES:
        call(train.main, "faces", "--diffusion.dataset-name", pictures, *TINY, "--diffusion.recompute", mode,
             "--runs", tmp_path / mode)  # fmt: skip
        runs[mode] = newest(next((tmp_path / mode).iterdir()))
    for name, value in runs["norms"]["model"].items():
        assert torch.equal(value, runs["none"]["model"][name])
        assert torch.equal(value, runs["blocks"]["model"][name])


def test_a_resumed_run_may_recompute_more(unfinished, tiny_run):
    call(train.main, "--resume", unfinished, "--diffusion.recompute", "blocks")
    for name, value in newest(unfinished)["model"].items():
        assert torch.equal(value, newest(tiny_run)["model"][name])
