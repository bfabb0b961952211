"""Adam and Muon, beside PyTorch's own and a singular value decomposition."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from functions.optimizers import OPTIMIZERS, Muon, orthogonal_factor
from tests.conftest import normal

RATE = 1e-2
EPS = 1e-8


@pytest.mark.parametrize("shape", [(24, 24), (16, 144), (64, 16)])
@pytest.mark.parametrize(
    "precision, tolerance",
    [(torch.float32, 1e-4), (torch.bfloat16, 0.05)],
)
def test_the_factor_has_the_singular_vectors_and_values_near_one(shape, precision, tolerance):
    """The band of Newton-Schulz's singular values is that of the quintic, found on a grid."""
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(3, *shape, dtype=torch.float64), full_matrices=False)
    s = torch.linspace(0.1, 1, min(shape), dtype=torch.float64)
    matrices = (1e-3 * u * s @ v).float()

    factor = orthogonal_factor(matrices, EPS, precision)
    assert factor.dtype == torch.float32
    values = u.mT @ factor.double() @ v.mT
    diagonal = values.diagonal(dim1=1, dim2=2)
    assert (values - torch.diag_embed(diagonal)).abs().max() < tolerance
    assert diagonal.min() > 0.68 - tolerance
    assert diagonal.max() < 1.21 + tolerance


def test_matrices_move_as_those_of_pytorch_and_the_rest_as_adams():
    """PyTorch's Muon takes matrices alone, and computes in bfloat16, as ours does here.

    Of channels_last the matrices have other columns first, which changes rounding alone. An
    embedding is no matrix, whatever its shape.
    """
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(16, 32, 3),
        nn.Conv2d(16, 32, 3),
        nn.Linear(64, 16),
        nn.GroupNorm(4, 32),
        nn.Conv2d(32, 3, 3),
        nn.Embedding(21, 64),
    )
    layers.to(memory_format=torch.channels_last)
    ours = dict(layers.named_parameters())
    start = {name: p.detach().clone() for name, p in ours.items()}

    matrices = [f"{i}.weight" for i in range(3)]
    others = [name for name in ours if name not in matrices]
    theirs = {name: nn.Parameter(p.clone()) for name, p in start.items()}
    for name in matrices:
        theirs[name].data = theirs[name].data.flatten(1)
    with torch.autocast("cpu", torch.bfloat16):
        muon = OPTIMIZERS["muon"](layers, RATE)
    optimizers = [
        muon,
        torch.optim.Muon(
            [theirs[name] for name in matrices],
            lr=RATE,
            weight_decay=0,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.Adam([theirs[name] for name in others], lr=RATE, fused=True),
    ]

    for _ in range(5):
        for name, p in ours.items():
            p.grad = torch.randn(p.shape).to(p)
            theirs[name].grad = p.grad.clone().view_as(theirs[name])
        for optimizer in optimizers:
            optimizer.step()

    for name in matrices:
        expected = theirs[name].view_as(ours[name])
        error = (ours[name] - expected).norm()
        assert error < 0.05 * (expected - start[name]).norm()
        assert optimizers[0].state[ours[name]].keys() == {"exp_avg"}
    for name in others:
        assert torch.equal(ours[name], theirs[name])


def moved(scale):
    """Return by how much a first step moves a matrix whose gradient has this RMS."""
    matrix = nn.Parameter(torch.zeros(32, 144))
    matrix.grad = scale * normal(0, *matrix.shape)
    Muon(nn.ParameterList([matrix]), RATE).step()
    return matrix.detach()


def test_the_size_of_a_gradient_counts_only_where_it_is_rounding():
    """As with Adam, half a step is left where the RMS is eps. Squares of 1e-30 are 0 in float32.

    The first step's momentum, with Nesterov's step ahead, is 0.05 + 0.95 x 0.05 of the gradient.
    """
    full = moved(1e-2)
    # Updates have the RMS that those of Adam have, which is 0.2 to 0.4 of the rate.
    assert 0.15 < full.square().mean().sqrt() / RATE < 0.25
    assert_close(moved(1e-4), full, rtol=1e-3, atol=1e-3 * RATE)
    half = moved(EPS / (0.05 + 0.95 * 0.05))
    assert_close(half.norm(), full.norm() / 2, rtol=0.01, atol=0)
    for scale, most in {1e-11: 0.01, 1e-30: 1e-6, 0: 0}.items():
        assert moved(scale).norm() <= most * full.norm()
