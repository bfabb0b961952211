"""The timestep, as the network sees it: a sinusoidal embedding and two linear layers (Ho et al. 2020, Appendix B)."""

import math

import torch
from torch import Tensor, nn


def sinusoidal_embedding(t: Tensor, dim: int) -> Tensor:
    """Embed integer timesteps as sines and cosines of geometrically spaced frequencies.

    "Attention Is All You Need", Section 3.5, in the form of Ho's code: all sines first, then all cosines, with
    frequencies 10000^(-i / (dim/2 - 1)) for i = 0 .. dim/2 - 1, hence from 1 down to exactly 1/10000.

    Args:
        t: (B,) timesteps, integer or float.
        dim: size of the embedding; even and at least 4 (`ValueError` otherwise).

    Returns:
        (B, dim) float32.
    """
    if dim < 4 or dim % 2:
        raise ValueError(f"the embedding's dim is {dim}; it must be even and at least 4")
    half_dim = dim // 2
    exponent = torch.arange(half_dim, dtype=torch.float32, device=t.device) / (half_dim - 1)
    angles = t.float()[:, None] * torch.exp(-math.log(10_000) * exponent)[None, :]  # (B, dim/2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)  # (B, dim)


class TimeEmbedding(nn.Module):
    """t (B,) -> (B, 4 base_dim): sinusoid, Linear, SiLU, Linear. Every residual block adds a projection of it."""

    def __init__(self, base_dim: int):
        super().__init__()
        self.base_dim = base_dim
        self.linear_1 = nn.Linear(base_dim, 4 * base_dim)
        self.linear_2 = nn.Linear(4 * base_dim, 4 * base_dim)

    def forward(self, t: Tensor) -> Tensor:
        embedding = sinusoidal_embedding(t, self.base_dim)  # (B, base_dim), float32 under autocast too
        return self.linear_2(nn.functional.silu(self.linear_1(embedding)))  # (B, 4 base_dim)
