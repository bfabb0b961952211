"""Averages of the weights over the steps of training, with which samples are drawn.

`update_ema` updates an exponential moving average (EMA; Ho et al. 2020, Appendix B), whose decay
must be chosen before training. Power averages (Karras et al. 2024, arXiv:2312.02696, Sections 3.1
to 3.3) let one choose after training: a weighted sum of snapshots of them is the average of another
length. After t steps, the weights of step k have a share proportional to k^gamma in such an
average, which therefore grows with the run. Its relative length is the standard deviation of k,
weighted by these shares, divided by t.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor


@torch.no_grad()
def update_ema(
    averages: Sequence[Tensor],
    parameters: Sequence[Tensor],
    step: int,
    decay: float,
    ramp: bool = True,
) -> None:
    """Update each average in place: average = decay * average + (1 - decay) * parameter.

    Args:
        averages: the parameters of a deep copy of the network, made before training.
        parameters: the network's, in the same order.
        step: the number of earlier updates, 0, 1, ...
        decay: the final decay, 0 <= decay < 1, such as 0.9999.
        ramp: use min(decay, (1 + step) / (10 + step)) as the decay. False uses the final decay from
            the first step on, for training that starts from trained weights.
    """
    # A small decay early in training makes the average forget the random initial weights.
    # Otherwise they would persist for about 1 / (1 - decay) steps, and spoil samples of short runs.
    if ramp:
        decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(averages, parameters, 1 - decay)


@cache
def power_exponent(length: float) -> float:
    """Return gamma of the power average with a relative length, 0 < length < 0.3.

    The two are related by length^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)). If all steps have
    equal shares, gamma is 0 and the length is 1 / sqrt(12) = 0.289.
    """
    # This is the equation gamma^3 + 7 gamma^2 + (16 - a) gamma + 12 - a = 0. Its roots are the
    # eigenvalues of the companion matrix, and the largest is gamma.
    a = length**-2
    companion = torch.tensor([[-7, a - 16, a - 12], [1, 0, 0], [0, 1, 0]], dtype=torch.float64)
    return torch.linalg.eigvals(companion).real.max().item()


def power_decay(length: float, step: int) -> float:
    """Return the decay with which `update_ema` computes a power average, after `step` updates.

    In the first step it is 0, so the average forgets the initial weights.
    """
    return (1 - 1 / (step + 1)) ** (power_exponent(length) + 1)


def mixing_weights(
    lengths: Sequence[float], steps: Sequence[int], length: float, step: int
) -> Tensor:
    """Return the factors whose weighted sum of snapshots is the power average of another length.

    Snapshot i is the power average of lengths[i] after steps[i] steps, and the sum is that of
    `length` after `step` steps. Among all sums of the snapshots, its shares of the steps have the
    smallest squared error (Algorithm 3). The factors are float64 (N,).
    """
    # The target comes last. Dividing by `step` does not change the result.
    gammas = torch.tensor([*map(power_exponent, [*lengths, length])], dtype=torch.float64)
    times = torch.tensor([*steps, step], dtype=torch.float64) / step
    # The share at time s of an average at time t is (gamma + 1) s^gamma / t^(gamma + 1), for s up
    # to t. These are the integrals of the products of two such shares. All powers are at most 1.
    rows = gammas[:, None]
    ratios = times[:, None] / times
    powers = ratios ** torch.where(ratios < 1, gammas, -rows)
    latest = torch.maximum(times[:, None], times)
    products = (rows + 1) * (gammas + 1) / (rows + gammas + 1) * powers / latest

    # Algorithm 3 minimises without a constraint. Here the factors have the sum 1, so that the part
    # of the weights that does not change during training is exact. With 20 snapshots, the error of
    # the sum is up to 10 times smaller.
    target = products[:, -1].clone()
    target[-1] = 1
    # The unknowns are the factors and a Lagrange multiplier: [[A, 1], [1, 0]] [f, m] = [b, 1].
    products[-1, :] = 1
    products[:, -1] = 1
    products[-1, -1] = 0
    return torch.linalg.solve(products, target)[:-1]
