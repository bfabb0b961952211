"""The parts of the U-Net: norm, time embedding, residual block, self-attention and resampling.

They follow Ho et al. 2020 (Appendix B, and the released code). All activations are SiLU.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoidal_embedding(t: Tensor, dim: int) -> Tensor:
    """Embed timesteps (B,) as sines and cosines of many frequencies: (B, dim) float32.

    This is Section 3.5 of "Attention Is All You Need" in the form of Ho's code: all sines first,
    then all cosines, with the frequencies 10000^(-i / (dim/2 - 1)) for i = 0 .. dim/2 - 1. dim is
    even and at least 4.
    """
    half_dim = dim // 2
    i = torch.arange(half_dim, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(-math.log(10_000) * (i / (half_dim - 1)))  # (dim/2,)
    angles = t.float()[:, None] * frequencies  # (B, dim/2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)  # (B, dim)


class GroupNorm(nn.GroupNorm):
    """PyTorch's group norm (Wu and He 2018), whose output has its input's dtype on CUDA, too."""

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cuda:
            return super().forward(x)
        # Under CUDA's autocast group norm would return float32, and its input and its output would
        # be kept for backward in float32, too. The kernel adds up in float32 for every dtype.
        with torch.autocast("cuda", enabled=False):
            weight = self.weight.to(x.dtype)
            bias = self.bias.to(x.dtype)
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class TimeEmbedding(nn.Module):
    """An embedding of timesteps (B,) as (B, 4 base_dim): sinusoid, Linear, SiLU, Linear."""

    def __init__(self, base_dim: int):
        super().__init__()
        self.base_dim = base_dim
        self.linear_1 = nn.Linear(base_dim, 4 * base_dim)
        self.linear_2 = nn.Linear(4 * base_dim, 4 * base_dim)

    def forward(self, t: Tensor) -> Tensor:
        # The sinusoid stays float32 under autocast: bfloat16 would round large timesteps.
        embedding = sinusoidal_embedding(t, self.base_dim)  # (B, base_dim)
        h = F.silu(self.linear_1(embedding.to(self.linear_1.weight.dtype)))
        return self.linear_2(h)  # (B, 4 base_dim)


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice, with the time embedding added in between, plus a shortcut.

    The shortcut is a 1x1 convolution where the number of channels changes.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_dim: int,
        dropout: float,
        norm: Callable[[int], GroupNorm],
    ):
        super().__init__()
        self.norm_1 = norm(in_channels)
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_projection = nn.Linear(time_dim, out_channels)
        self.norm_2 = norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, time_embedding: Tensor) -> Tensor:
        """Map x (B, in_channels, H, W) and embedding (B, time_dim) to (B, out_channels, H, W)."""
        h = F.silu(self.norm_1(x))
        h = self.conv_1(h)
        h = h + self.time_projection(F.silu(time_embedding))[:, :, None, None]
        h = F.silu(self.norm_2(h))
        h = self.conv_2(self.dropout(h))
        return h + self.shortcut(x)


class SelfAttention(nn.Module):
    """Self-attention over all H x W positions, with a single head."""

    def __init__(self, channels: int, norm: Callable[[int], GroupNorm]):
        super().__init__()
        self.norm = norm(channels)
        self.query = nn.Conv2d(channels, channels, 1)
        self.key = nn.Conv2d(channels, channels, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (
            layer(h).flatten(2).mT[:, None]  # (B, 1, H W, C), with a dimension for the head
            for layer in (self.query, self.key, self.value)
        )
        h = F.scaled_dot_product_attention(q, k, v)  # (B, 1, H W, C)
        h = h.mT.reshape(x.shape)  # (B, C, H, W)
        return x + self.out(h)


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2, which halves H and W: (B, C, H, W) -> (B, C, H/2, W/2)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        # Only the right and the bottom are padded, as in Ho's code: TensorFlow's 'SAME'.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour doubling and a 3x3 convolution: (B, C, H, W) -> (B, C, 2H, 2W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x)
