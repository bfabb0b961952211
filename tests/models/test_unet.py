"""The network: the paper's parameter counts, and the same function as diffusers' with the same weights."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from benchmarks.compare import build_diffusers
from config import EXPERIMENTS, ModelConfig
from functions.support.diffusers_folder import our_name, their_name
from models.blocks import Upsample, sinusoidal_embedding
from models.unet import UNet


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        (EXPERIMENTS["ffhq-run2"].model, 60_372_867),  # the reference
        (EXPERIMENTS["ffhq-full"].model, 241_348_355),  # the full run
        (EXPERIMENTS["cifar10"].model, 35_746_307),
        (ModelConfig(8, (1, 1, 2, 2, 4, 4), (4,), 128, image_size=256), 113_673_219),  # CelebA-HQ
    ],
)
def test_parameter_counts_are_the_papers(shape, count):
    with torch.device("meta"):
        model = UNet(**vars(shape))
    assert sum(p.numel() for p in model.parameters()) == count


SMALL = {
    "attention at the lowest level": ModelConfig(
        4, (1, 2, 2), (2,), base_dim=16, image_size=16, norm_groups=8
    ),
    "attention in the middle, uneven channels": ModelConfig(
        4, (1, 3, 2, 4), (1, 2), 16, image_size=32, norm_groups=4
    ),
    "diffusers' details": ModelConfig(
        4, (1, 3, 2), (1, 2), 16, image_size=16, norm_groups=4, dialect="diffusers"
    ),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", SMALL.values(), ids=SMALL)
def test_same_function_and_gradients_as_diffusers_with_the_same_weights(shape, layout):
    torch.manual_seed(0)
    ours, theirs = UNet(**vars(shape)), build_diffusers(shape)
    their_parameters = dict(theirs.named_parameters())
    pairs = {
        name: (p, their_parameters.pop(their_name(name))) for name, p in ours.named_parameters()
    }
    assert not their_parameters  # each of theirs is one of ours
    assert [our_name(their_name(name)) for name in pairs] == [*pairs]
    for parameter, other in pairs.values():
        # Norms and biases start at 1 and 0, which hides a mix-up
        other.data.add_(0.05 * torch.randn_like(other))
        # Our 1x1 convolutions are Linear layers of theirs
        parameter.data.copy_(other.data.reshape(parameter.shape))
    ours.to(memory_format=layout)
    x_t, t = torch.randn(3, 3, shape.image_size, shape.image_size), torch.tensor([0, 421, 999])
    found, expected = ours(x_t, t), theirs(x_t, t).sample
    assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for output in (found, expected):
        output.square().mean().backward()
    for name, (parameter, other) in pairs.items():
        expected = other.grad.reshape(parameter.shape)
        assert_close(
            parameter.grad,
            expected,
            rtol=1e-3,
            atol=2e-5,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_time_embedding_is_the_papers():
    t = torch.tensor([0, 1, 17, 999])
    angles = t.numpy()[:, None] * 10_000.0 ** (-np.arange(32) / 31)
    expected = np.concatenate([np.sin(angles), np.cos(angles)], 1).astype(np.float32)
    assert_close(sinusoidal_embedding(t, 64).numpy(), expected, rtol=1e-4, atol=1e-4)


def test_initial_weights_are_hos():
    torch.manual_seed(0)
    model = UNet(32, 3, 8, [1, 2, 2], [1], 64)
    zero = ("conv_2.weight", "out.weight")  # the ends of residual branches and of the network
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            assert bool((parameter == 1).all()), name
        elif name.endswith(("bias", *zero)):
            assert not parameter.any(), name
        else:  # variance 1 / mean(fan_in, fan_out), uniform
            receptive = parameter[0, 0].numel() if parameter.dim() == 4 else 1
            limit = (3 / (receptive * sum(parameter.shape[:2]) / 2)) ** 0.5
            assert parameter.abs().max() <= limit, name
            assert parameter.std().item() == pytest.approx(limit / 3**0.5, rel=0.1), name
    assert not model(torch.randn(2, 3, 32, 32), torch.tensor([3, 900])).any()


@pytest.mark.parametrize("dim", [3, 2, 7])
def test_an_odd_embedding_is_refused(dim):
    with pytest.raises(ValueError, match="even"):
        sinusoidal_embedding(torch.tensor([1]), dim)


def test_heads_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(ValueError, match="12 channels cannot be cut into heads of 8"):
        UNet(8, 3, 4, [1, 3], [1], 4, norm_groups=4, dialect="diffusers")


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
