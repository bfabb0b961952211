"""Power averages are those of their definition, and snapshots of two give any other."""

import numpy as np
import pytest
import torch
from torch import nn

from functions.ema import mixing_weights, power_decay, power_exponent, update_ema

STEPS, EVERY = 1000, 50


def shares(length, step):
    """Return the share of each step in a power average: the integral of its density, (step,)."""
    bounds = (np.arange(step + 1) / step) ** (power_exponent(length) + 1)
    return torch.from_numpy(np.diff(bounds))


@pytest.fixture(scope="module")
def trajectory():
    """Return 300 weights on their way: a start, a drift that slows, and a random walk. float64.

    As in a network, the start is as large as all that training changes.
    """
    generator = torch.Generator().manual_seed(0)
    start, drift = torch.randn(2, 300, generator=generator, dtype=torch.float64)
    walk = torch.randn(STEPS, 300, generator=generator, dtype=torch.float64).cumsum(0)
    done = torch.arange(1, STEPS + 1, dtype=torch.float64)[:, None] / STEPS
    return start + done**0.5 * drift + walk / STEPS**0.5


@pytest.mark.parametrize("length", [0.01, 0.05, 0.2, 0.28])
def test_the_length_is_the_standard_deviation_of_the_steps(length):
    k = torch.arange(20_000) + 0.5
    share = shares(length, 20_000)
    mean = (share * k).sum()
    deviation = (share * (k - mean) ** 2).sum().sqrt()
    assert deviation.item() / 20_000 == pytest.approx(length, rel=1e-4)


@pytest.mark.parametrize("length", [0.05, 0.2])
def test_the_updates_give_each_step_its_share(length, trajectory):
    model, average = nn.Linear(300, 1, bias=False).double(), nn.Linear(300, 1, bias=False).double()
    for step, weights in enumerate(trajectory[:100]):
        model.weight.data[:] = weights
        decay = power_decay(length, step)
        update_ema([average.weight], [model.weight], step, decay, ramp=False)
    expected = shares(length, 100) @ trajectory[:100]
    torch.testing.assert_close(average.weight.data[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("length", "most", "most_in_float16"),
    [
        (0.03, 0.1, 0.3),
        (0.05, 1e-10, 0.05),
        (0.07, 0.005, 0.03),
        (0.1, 1e-10, 0.03),
        (0.12, 0.003, 0.02),
        (0.15, 0.004, 0.02),
        (0.2, 0.03, 0.03),
    ],
)
def test_another_length_is_reconstructed(length, most, most_in_float16, trajectory):
    """The unit of errors is the distance to the average that is a tenth longer.

    As in the paper, the error is small between the lengths that were averaged, and grows outside.
    There are 20 snapshots of each. In float16 the error is mostly that of rounding.
    """
    pairs = [(ours, step) for step in range(EVERY, STEPS + 1, EVERY) for ours in (0.05, 0.1)]
    snapshots = torch.stack([shares(*pair) @ trajectory[: pair[1]] for pair in pairs])
    factors = mixing_weights(*zip(*pairs, strict=True), length, STEPS)

    expected = shares(length, STEPS) @ trajectory
    unit = (shares(1.1 * length, STEPS) @ trajectory - expected).norm()
    assert (factors @ snapshots - expected).norm() < most * unit
    assert (factors @ snapshots.half().double() - expected).norm() < most_in_float16 * unit
