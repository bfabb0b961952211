"""The network: the paper's parameter counts, and the same function as diffusers' with the same weights."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn
from torch.testing import assert_close

from benchmarks.compare import build_diffusers
from config import ModelConfig
from models.blocks import ResidualBlock, SelfAttention, Upsample, doubled_kernel, sinusoidal_embedding
from models.unet import UNet

PAPER = {
    "reference": (dict(image_size=128, lowest_resolution_size=8, dim_multiply=[1, 2, 2, 4, 8],
                       transformer_layers=[3], base_dim=64), 60_372_867),
    "full run": (dict(image_size=128, lowest_resolution_size=8, dim_multiply=[1, 2, 2, 4, 8],
                      transformer_layers=[3], base_dim=128), 241_348_355),
    "CIFAR-10": (dict(image_size=32, lowest_resolution_size=4, dim_multiply=[1, 2, 2, 2],
                      transformer_layers=[1], base_dim=128), 35_746_307),
    "CelebA-HQ": (dict(image_size=256, lowest_resolution_size=8, dim_multiply=[1, 1, 2, 2, 4, 4],
                       transformer_layers=[4], base_dim=128), 113_673_219),
}  # fmt: skip

SMALL = {
    "attention at the lowest level": dict(image_size=16, channels=3, lowest_resolution_size=4, dim_multiply=[1, 2, 2],
                                          transformer_layers=[2], base_dim=32, norm_groups=8),
    "attention in the middle, channels back and forth": dict(
        image_size=32, channels=3, lowest_resolution_size=4, dim_multiply=[1, 3, 2, 4], transformer_layers=[1, 2],
        base_dim=16, norm_groups=4),
}  # fmt: skip


@pytest.mark.parametrize("name", PAPER)
def test_parameter_counts_are_the_papers(name):
    config, count = PAPER[name]
    with torch.device("meta"):
        model = UNet(channels=3, **config)
    assert sum(p.numel() for p in model.parameters()) == count


def diffusers_twin(config):
    """diffusers' U-Net of the same configuration."""
    return build_diffusers(ModelConfig(**config))


def copy_weights(theirs: UNet2DModel, ours: UNet) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Give ours the weights of theirs, layer by layer, and check that every parameter of ours was set: the pairs."""
    seen, pairs = set(), []

    def layer(target: nn.Module, source: nn.Module) -> None:
        for name, parameter in target.named_parameters():
            value = dict(source.named_parameters())[name]
            parameter.data.copy_(value.reshape(parameter.shape))  # their attention has Linear for our 1x1 convolutions
            seen.add(id(parameter))
            pairs.append((parameter, value))

    def block(target: ResidualBlock, source: nn.Module) -> None:
        for mine, other in {
            "norm_1": "norm1",
            "conv_1": "conv1",
            "time_projection": "time_emb_proj",
            "norm_2": "norm2",
            "conv_2": "conv2",
            "shortcut": "conv_shortcut",
        }.items():
            if mine != "shortcut" or getattr(source, other) is not None:
                layer(getattr(target, mine), getattr(source, other))  # fmt: skip

    def attention(target: SelfAttention, source: nn.Module) -> None:
        for mine, other in {
            "norm": source.group_norm,
            "query": source.to_q,
            "key": source.to_k,
            "value": source.to_v,
            "out": source.to_out[0],
        }.items():
            layer(getattr(target, mine), other)  # fmt: skip

    layer(ours.time_embedding, theirs.time_embedding)
    layer(ours.conv_in, theirs.conv_in)
    for stages, blocks, resample in ((ours.down, theirs.down_blocks, "downsample"),
                                     (ours.up, theirs.up_blocks, "upsample")):  # fmt: skip
        for stage, other in zip(stages, blocks, strict=True):
            for mine, source in zip(stage["blocks"], other.resnets, strict=True):
                block(mine, source)
            for mine, source in zip(stage["attentions"], getattr(other, "attentions", []), strict=False):
                attention(mine, source)
            if resample in stage:
                layer(stage[resample], getattr(other, f"{resample}rs")[0])
    block(ours.middle_block_1, theirs.mid_block.resnets[0])
    attention(ours.middle_attention, theirs.mid_block.attentions[0])
    block(ours.middle_block_2, theirs.mid_block.resnets[1])
    layer(ours.norm_out, theirs.conv_norm_out)
    layer(ours.conv_out, theirs.conv_out)
    assert seen == {id(parameter) for parameter in ours.parameters()}
    assert len({id(value) for _, value in pairs}) == len(pairs)  # each of theirs once
    return pairs


@pytest.mark.parametrize("name", SMALL)
def test_same_function_as_diffusers_with_the_same_weights(name):
    torch.manual_seed(0)
    theirs, ours = diffusers_twin(SMALL[name]).eval(), UNet(**SMALL[name]).eval()
    for parameter in theirs.parameters():  # norms and biases start at 1 and 0, where a mix-up would not show
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    pairs = copy_weights(theirs, ours)
    x_t, t = torch.randn(3, 3, ours.image_size, ours.image_size), torch.tensor([0, 421, 999])
    with torch.no_grad():
        assert_close(ours(x_t, t), theirs(x_t, t).sample, rtol=1e-5, atol=1e-5)
    for recompute in ("none", "norms", "blocks"):
        ours.set_recompute(recompute)
        for net in (ours, theirs):
            net.zero_grad()
        ours(x_t, t).square().mean().backward()
        theirs(x_t, t).sample.square().mean().backward()
        for parameter, value in pairs:
            assert_close(parameter.grad, value.grad.reshape(parameter.shape), rtol=1e-3, atol=2e-5)


def test_on_the_meta_device_it_gives_shapes():
    with torch.device("meta"):
        model = UNet(**SMALL["attention at the lowest level"])
        assert model(torch.empty(2, 3, 16, 16), torch.empty(2, dtype=torch.int64)).shape == (2, 3, 16, 16)


def test_time_embedding_is_the_papers():
    t = torch.tensor([0, 1, 17, 999])
    ours = sinusoidal_embedding(t, 64)
    frequencies = 10_000.0 ** (-np.arange(32) / 31)
    angles = t.numpy()[:, None] * frequencies
    assert_close(ours.numpy(), np.concatenate([np.sin(angles), np.cos(angles)], 1).astype(np.float32),
                 rtol=1e-4, atol=1e-4)  # fmt: skip
    theirs = get_timestep_embedding(t, 64, flip_sin_to_cos=False, downscale_freq_shift=1)
    assert_close(ours, theirs, rtol=1e-4, atol=1e-4)  # float32 angles up to 999, rounded in another order


def test_initial_weights_are_hos():
    torch.manual_seed(0)
    model = UNet(channels=3, image_size=32, lowest_resolution_size=8, dim_multiply=[1, 2, 2], transformer_layers=[1],
                 base_dim=64)  # fmt: skip
    zero = {"conv_2.weight", "out.weight", "conv_out.weight"}  # the ends of residual branches, and of the network
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or any(name.endswith(f".{end}") or name == end for end in zero):
            assert not parameter.any(), name
        elif "norm" in name:
            assert bool((parameter == 1).all()), name
        else:  # variance 1 / mean(fan_in, fan_out), uniform
            receptive = parameter[0, 0].numel() if parameter.dim() == 4 else 1
            limit = (3 / (receptive * sum(parameter.shape[:2]) / 2)) ** 0.5
            assert parameter.abs().max() <= limit, name
            assert parameter.std().item() == pytest.approx(limit / 3**0.5, rel=0.1), name
    assert not model(torch.randn(2, 3, 32, 32), torch.tensor([3, 900])).any()


def test_every_parameter_learns():
    """After a step from the zero initialisation, every parameter has a gradient: nothing is left out of the graph."""
    torch.manual_seed(0)
    model = UNet(**SMALL["attention at the lowest level"])
    x_t, t = torch.randn(4, 3, 16, 16), torch.tensor([1, 200, 600, 999])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(4):  # the zeroed layers let gradients through one after another
        optimizer.zero_grad()
        (model(x_t, t) - x_t).square().mean().backward()
        optimizer.step()
    # A key's bias shifts all scores of a query alike, which softmax ignores; its gradient is rounding error.
    silent = [n for n, p in model.named_parameters() if not p.grad.any() and not n.endswith("key.bias")]
    assert not silent


def test_images_of_a_batch_do_not_mix():
    torch.manual_seed(0)
    model = UNet(**SMALL["attention at the lowest level"]).eval()
    for parameter in model.parameters():  # else the zeros at the ends of the branches hide what they do
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    x_t, t = torch.randn(4, 3, 16, 16), torch.tensor([0, 50, 500, 999])
    with torch.no_grad():
        together, other_times = model(x_t, t), model(x_t, t.flip(0))
        alone = torch.cat([model(x_t[i : i + 1], t[i : i + 1]) for i in range(4)])
    assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert (other_times - together).abs().max() > 1e-3  # and the timestep matters


@pytest.mark.parametrize("dim", [3, 2, 7])
def test_an_odd_embedding_is_refused(dim):
    with pytest.raises(ValueError, match="even"):
        sinusoidal_embedding(torch.tensor([1]), dim)


def test_levels_that_miss_the_lowest_resolution_are_refused():
    with pytest.raises(ValueError, match="not to lowest_resolution_size = 8"):
        UNet(32, 3, 8, [1, 2, 2, 2], [1], 32)


@pytest.mark.parametrize("size", [5, 16])  # below and above WORTH_DOUBLING
def test_upsampling_is_nearest_neighbour_and_convolution(size):
    upsample = Upsample(4).double()
    x = torch.randn(2, 4, size, size, dtype=torch.float64, requires_grad=True)
    plain = lambda x: upsample.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    results = []
    for way in (upsample, plain):
        y = way(x)
        seen = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
        results.append([y, *torch.autograd.grad(y, [x, *upsample.parameters()], seen)])
    assert results[0][0].shape == (2, 4, 2 * size, 2 * size)
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs)


def test_the_doubled_kernel_of_one_weight_is_a_square_of_four():
    """Weight (0, 2) alone: output o sees the doubled pixel o + (0, 2) - 1, so each pixel fills 4 outputs."""
    weight = torch.zeros(1, 1, 3, 3)
    weight[0, 0, 0, 2] = 1
    expected = torch.zeros(4, 4)
    expected[2:4, 0:2] = 1  # rows 2i + 1 and 2i + 2, columns 2j - 1 and 2j, where the kernel begins at 2i - 1, 2j - 1
    assert_close(doubled_kernel(weight)[0, 0], expected)
