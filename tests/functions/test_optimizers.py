"""Adam and Muon, beside PyTorch's own and a singular value decomposition."""

import copy

import pytest
import torch
from torch import nn

from functions.optimizers import OPTIMIZERS, Muon, orthogonal_factor

RATE = 1e-2
EPS = 1e-8


def network():
    """Return layers with two matrices of equal shape, one of another, and what is no matrix."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(16, 32, 3),
        nn.GroupNorm(4, 32),
        nn.Conv2d(16, 32, 3),
        nn.Linear(64, 16),
        nn.Conv2d(32, 3, 3),
    )
    return layers.to(memory_format=torch.channels_last)


def draw_gradients(layers, scale=1.0):
    for p in layers.parameters():
        p.grad = scale * torch.randn(p.shape).to(p)


def muon(layers, precision=torch.float32):
    return Muon(layers.parameters(), RATE, precision)


def moved(scale):
    """Return by how much a first step moves each matrix whose gradient has this RMS."""
    layers = network()
    before = copy.deepcopy(layers)
    torch.manual_seed(1)
    draw_gradients(layers, scale)
    optimizer = muon(layers)
    optimizer.step()
    pairs = zip(layers.parameters(), before.parameters(), strict=True)
    changes = [(new - old).flatten() for new, old in pairs if optimizer.is_matrix(new)]
    return torch.cat(changes).detach()


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

    Of channels_last the matrices have other columns first, which changes rounding alone.
    """
    layers = network()
    theirs = copy.deepcopy(layers)
    optimizer = muon(layers, torch.bfloat16)
    matrices = [p for p in theirs.parameters() if optimizer.is_matrix(p)]
    flat = {p: nn.Parameter(p.detach().flatten(1)) for p in matrices}
    assert len(flat) == 3
    theirs_muon = torch.optim.Muon(
        flat.values(), lr=RATE, weight_decay=0, adjust_lr_fn="match_rms_adamw"
    )
    theirs_adam = torch.optim.Adam(
        [p for p in theirs.parameters() if p not in flat], lr=RATE, fused=True
    )

    for _ in range(5):
        draw_gradients(layers)
        for p, other in zip(layers.parameters(), theirs.parameters(), strict=True):
            other.grad = p.grad.clone()
        for other, matrix in flat.items():
            matrix.grad = other.grad.flatten(1)

        for each in (optimizer, theirs_muon, theirs_adam):
            each.step()

    start = network().parameters()
    for old, p, other in zip(start, layers.parameters(), theirs.parameters(), strict=True):
        if other in flat:
            expected = flat[other].view_as(p) - old
            assert (p - old - expected).norm() < 0.05 * expected.norm()
        else:
            assert torch.equal(p, other)


def test_the_size_of_a_gradient_counts_only_where_it_is_rounding():
    """As with Adam, half a step is left where the RMS is eps. Squares of 1e-30 are 0 in float32.

    The first step's momentum, with Nesterov's step ahead, is 0.05 + 0.95 x 0.05 of the gradient.
    """
    full = moved(1e-2)
    # Updates have the RMS that those of Adam have, which is 0.2 to 0.4 of the rate.
    assert 0.15 < full.square().mean().sqrt() / RATE < 0.25
    torch.testing.assert_close(moved(1e-4), full, rtol=1e-3, atol=1e-3 * RATE)
    half = moved(EPS / (0.05 + 0.95 * 0.05))
    torch.testing.assert_close(half.norm(), full.norm() / 2, rtol=0.01, atol=0)
    for scale, most in {1e-11: 0.01, 1e-30: 1e-6, 0: 0}.items():
        assert moved(scale).norm() <= most * full.norm()


def test_muon_moves_each_group_at_its_own_rate():
    fast, slow, start = network(), network(), network()
    for layers in (fast, slow):
        torch.manual_seed(1)
        draw_gradients(layers)
    groups = [{"params": fast.parameters()}, {"params": slow.parameters(), "lr": RATE / 10}]
    Muon(groups, RATE, torch.float32).step()
    for p, other, old in zip(*(each.parameters() for each in (fast, slow, start)), strict=True):
        torch.testing.assert_close(p - old, 10 * (other - old), rtol=1e-3, atol=1e-6)


def test_adam_moves_a_table_of_any_size():
    """The truth is PyTorch's Adam, of a table alone that would be a matrix by its shape."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Embedding(21, 64), nn.Linear(64, 64))
    alone = copy.deepcopy(network[0])
    optimizer = OPTIMIZERS["muon"](network, RATE, torch.float32)
    theirs = torch.optim.Adam(alone.parameters(), lr=RATE, fused=True)
    for _ in range(3):
        draw_gradients(network)
        alone.weight.grad = network[0].weight.grad.clone()
        optimizer.step()
        theirs.step()
    assert torch.equal(network[0].weight, alone.weight)
    assert set(optimizer.state[network[1].weight]) == {"exp_avg"}
