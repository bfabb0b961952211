"""The optimisers: Adam, and Muon for weight matrices with Adam for all other parameters."""

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

# Nesterov's momentum of Muon, as Jordan has it.
MOMENTUM = 0.95
# Muon moves only weights with at least this many rows and columns. Adam moves the biases, the norms
# and the last convolution.
SMALLEST_SIDE = 16
# On a CPU a stack of matrices has at most this many elements, unless one matrix has more. Larger
# stacks do not fit in the cache, and took up to 1.4 times as long.
CPU_STACK = 2**19
# A step of Newton-Schulz maps each singular value s to A s + B s^3 + C s^5. With Jordan's
# coefficients, five steps bring all from 0.002 to 1 to between 0.68 and 1.2; 0 stays 0.
A, B, C = 3.4445, -4.7750, 2.0315
NEWTON_SCHULZ_STEPS = 5

# The values of a config's `lr_schedule`, and the factor by which each multiplies the learning rate
# at a step, 0 .. steps - 1, of a run.
LR_SCHEDULES = {
    "constant": lambda step, steps: 1.0,
    # It falls to 0 along a half cosine (Loshchilov and Hutter 2017, arXiv:1608.03983).
    "cosine": lambda step, steps: 0.5 * (1 + math.cos(math.pi * step / steps)),
}


def rate_of(config: Any, step: int, total_steps: int) -> float:
    """Return a step's learning rate: a linear warm-up, times the schedule.

    `config` has `learning_rate`, `warmup_steps` and `lr_schedule`, as a `DiffusionConfig` does.
    """
    rate = config.learning_rate * min(1.0, (step + 1) / (config.warmup_steps + 1))
    return rate * LR_SCHEDULES[config.lr_schedule](step, total_steps)


class Muon(torch.optim.Adam):
    """Move each matrix by the orthogonal factor of its momentum (Jordan et al. 2024).

    A weight (out, in, k, k) is a matrix (out, in k k). The factor is scaled by
    0.2 sqrt(longer side), which gives it the RMS of Adam's updates (Liu et al. 2025,
    arXiv:2502.16982), so that both have the same learning rate. The state of a matrix is only its
    momentum, under Adam's name `exp_avg`. Adam moves all other parameters. It also moves the
    tables of embeddings, which are no matrices to multiply with.

    Newton-Schulz runs in the precision of the autocast in which the optimizer is made, or in
    float32. PyTorch's Muon (2.13) takes matrices only, and runs it in bfloat16, which is slow on
    CPUs without instructions for it.
    """

    def __init__(self, network: nn.Module, lr: float):
        tables = {layer.weight for layer in network.modules() if isinstance(layer, nn.Embedding)}
        matrices, others = [], []
        for p in network.parameters():
            is_large = p.ndim > 1 and min(len(p), p[0].numel()) >= SMALLEST_SIDE
            (matrices if is_large and p not in tables else others).append(p)
        super().__init__([{"params": others}, {"params": matrices}], lr=lr, fused=True)
        device = p.device.type
        self.precision = torch.float32
        if torch.is_autocast_enabled(device):
            self.precision = torch.get_autocast_dtype(device)

    def __setstate__(self, state: dict) -> None:
        # Adam's own expects that each parameter has all of Adam's state.
        torch.optim.Optimizer.__setstate__(self, state)

    @torch.no_grad()
    def step(self) -> None:
        """Make one step."""
        others, group = groups = self.param_groups
        self.param_groups = [others]
        super().step()
        self.param_groups = groups

        stacks = defaultdict(list)
        for p in group["params"]:
            # As with Adam, a parameter that has no gradient stays as it is.
            if p.grad is not None:
                stacks[p.shape].append(p)
        # Matrices of equal shape are multiplied together: on a CPU as many as its cache may hold,
        # on a GPU all, because launching kernels takes longer there than computing.
        for weights in stacks.values():
            count = len(weights)
            if weights[0].device.type == "cpu":
                count = max(1, CPU_STACK // weights[0].numel())
            for start in range(0, len(weights), count):
                self.move(weights[start : start + count], group)

    def move(self, weights: list[Tensor], group: dict) -> None:
        """Make one step of N weights of equal shape, with the settings of their group."""
        for p in weights:
            if not self.state[p]:
                self.state[p]["exp_avg"] = torch.zeros_like(p)
        # Channels come last, as in memory: (N, out, k, k, in). The columns of the factors have the
        # same order.
        momenta = [self.state[p]["exp_avg"].movedim(1, -1) for p in weights]
        momentum = torch.stack(momenta)
        gradient = torch.stack([p.grad.movedim(1, -1) for p in weights])
        momentum.lerp_(gradient, 1 - MOMENTUM)
        torch._foreach_copy_(momenta, momentum.unbind())

        # Nesterov's momentum is a step ahead.
        matrices = gradient.lerp_(momentum, MOMENTUM).flatten(2)  # (N, out, k k in)
        updates = orthogonal_factor(matrices, group["eps"], self.precision).view(momentum.shape)
        scale = 0.2 * math.sqrt(max(matrices.shape[1:])) * group["lr"]
        torch._foreach_sub_([p.movedim(1, -1) for p in weights], updates.unbind(), alpha=scale)


# The values of a config's `optimizer`: (network, learning rate) -> any `torch.optim.Optimizer`.
# The rate of a parameter group that has its own falls and rises in proportion to the run's.
OPTIMIZERS = {
    # Kingma and Ba 2015, arXiv:1412.6980
    "adam": lambda network, lr: torch.optim.Adam(network.parameters(), lr, fused=True),
    "muon": Muon,
}


def orthogonal_factor(matrices: Tensor, eps: float, precision: torch.dtype) -> Tensor:
    """Return U V^T for each U S V^T = matrices (N, rows, columns), by Newton-Schulz: float32.

    Its singular values are between 0.68 and 1.2. They are smaller if the RMS of the matrix is not
    far above eps, as in Adam, which divides by RMS + eps. So rounding errors alone move little.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonal_factor(matrices.mT, eps, precision).mT
    norm = matrices.norm(dim=(1, 2), keepdim=True)  # (N, 1, 1)
    floor = eps * math.sqrt(matrices[0].numel())
    x = (matrices / norm.clamp(min=floor)).to(precision)  # (N, rows, columns)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    # x may be in half precision, but the product is float32.
    return x * (norm / (norm + floor))
