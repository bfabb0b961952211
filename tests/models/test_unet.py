"""The network: the paper's parameter counts, and the same function as diffusers' U-Net."""

import pytest
import torch
from torch.testing import assert_close

from benchmarks.compare import build_diffusers
from config import EXPERIMENTS, ModelConfig
from extras.diffusers_folder import renamed
from models.networks import build_network
from models.unet import UNet

CELEBA_HQ = ModelConfig(8, (1, 1, 2, 2, 4, 4), (4,), 128, image_size=256)


@pytest.mark.parametrize(
    "shape, count",
    [
        # The reference's network, and the one of the full run.
        (EXPERIMENTS["ffhq-run2"].model, 60_372_867),
        (EXPERIMENTS["ffhq-full"].model, 241_348_355),
        # The paper's networks.
        (EXPERIMENTS["cifar10"].model, 35_746_307),
        (CELEBA_HQ, 113_673_219),
    ],
)
def test_parameter_counts_are_the_papers(shape, count):
    with torch.device("meta"):
        model = build_network(shape)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


# The channels of the levels are uneven, and attention is in the middle and at the lowest level.
SMALL = ModelConfig(4, (1, 3, 2), (1, 2), 16, image_size=16, norm_groups=4)


def test_same_function_and_gradients_as_diffusers_with_the_same_weights():
    torch.manual_seed(0)
    ours = build_network(SMALL)
    theirs = build_diffusers(SMALL)

    # Norms and biases start at 1 and 0, which would hide a mix-up.
    for parameter in ours.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    theirs.load_state_dict(renamed(ours.state_dict(), theirs.state_dict()))
    theirs.double()
    ours.double().to(memory_format=torch.channels_last)

    x_t = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    t = torch.tensor([0, 421, 999])
    outputs = [ours(x_t, t), theirs(x_t, t).sample]
    # The time embeddings are in float32.
    assert_close(*outputs, rtol=1e-5, atol=1e-5)

    for output in outputs:
        output.square().mean().backward()
    gradients, others = (
        {name: parameter.grad for name, parameter in network.named_parameters()}
        for network in (ours, theirs)
    )
    # Each of our parameters has one of theirs, and no other is left.
    assert_close(renamed(gradients, others), others, rtol=1e-3, atol=2e-5)


def test_initial_weights_are_hos():
    torch.manual_seed(0)
    model = UNet(32, 3, 8, [1, 2, 2], [1], 64)

    # The ends of residual branches and of the network start at zero.
    zero = ("conv_2.weight", "out.weight")
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            assert torch.all(parameter == 1), name
        elif name.endswith(("bias", *zero)):
            assert not parameter.any(), name
        else:
            # All others are uniform with a variance of 1 / mean(fan_in, fan_out).
            receptive_field = parameter[0, 0].numel()
            fan_mean = receptive_field * sum(parameter.shape[:2]) / 2
            limit = (3 / fan_mean) ** 0.5
            assert parameter.abs().max() <= limit, name
            assert parameter.std().item() == pytest.approx(limit / 3**0.5, rel=0.1), name

    # So the output is zero.
    assert not model(torch.randn(2, 3, 32, 32), torch.tensor([3, 900])).any()


def test_levels_that_miss_the_lowest_resolution_are_refused():
    with pytest.raises(ValueError, match="not to lowest_resolution_size = 8"):
        UNet(32, 3, 8, [1, 2, 2, 2], [1], 32)
