"""The parts of the U-Net: time embedding, residual block, self-attention and resampling.

They follow Ho et al. 2020 (Appendix B, and the released code). All activations are SiLU.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.group_norm import GroupNorm  # PyTorch's, but faster


@dataclass(frozen=True)
class Dialect:
    """The details in which two versions of the network differ, by diffusers' names for them."""

    # Every GroupNorm uses this epsilon.
    norm_eps: float
    # 0 pads only the right and the bottom, as TensorFlow's 'SAME' does for an even size. 1 pads all
    # sides.
    downsample_padding: int
    # True puts the cosines before the sines in the time embedding.
    flip_sin_to_cos: bool
    # The frequencies of the time embedding are 10000^(-i / (dim/2 - freq_shift)).
    freq_shift: int
    # Each attention head has this number of channels. None means a single head.
    attention_head_dim: int | None


DIALECTS = {
    # The code of Ho et al. 2020 uses these values, so their published weights need them. The
    # epsilon is TensorFlow's default.
    "ho": Dialect(1e-6, 0, False, 1, None),
    # These are diffusers' defaults, which its training script uses.
    "diffusers": Dialect(1e-5, 1, True, 0, 8),
}


def sinusoidal_embedding(t: Tensor, dim: int, dialect: Dialect) -> Tensor:
    """Embed timesteps (B,) as sines and cosines of many frequencies: (B, dim) float32.

    This is Section 3.5 of "Attention Is All You Need" in the form of Ho's code: all sines first,
    then all cosines, with the frequencies 10000^(-i / (dim/2 - 1)) for i = 0 .. dim/2 - 1. dim is
    even and at least 4.
    """
    half_dim = dim // 2
    i = torch.arange(half_dim, dtype=torch.float32, device=t.device)
    exponents = i / (half_dim - dialect.freq_shift)
    frequencies = torch.exp(-math.log(10_000) * exponents)  # (dim/2,)
    angles = t.float()[:, None] * frequencies  # (B, dim/2)
    halves = [angles.sin(), angles.cos()]
    if dialect.flip_sin_to_cos:
        halves.reverse()
    return torch.cat(halves, dim=1)  # (B, dim)


class TimeEmbedding(nn.Module):
    """An embedding of timesteps (B,) as (B, 4 base_dim): sinusoid, Linear, SiLU, Linear."""

    def __init__(self, base_dim: int, dialect: Dialect):
        super().__init__()
        self.base_dim = base_dim
        self.dialect = dialect
        self.linear_1 = nn.Linear(base_dim, 4 * base_dim)
        self.linear_2 = nn.Linear(4 * base_dim, 4 * base_dim)

    def forward(self, t: Tensor) -> Tensor:
        # The sinusoid stays float32 under autocast: bfloat16 would round large timesteps.
        embedding = sinusoidal_embedding(t, self.base_dim, self.dialect)  # (B, base_dim)
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
    """Self-attention over all H x W positions, in heads of head_dim channels, or if None in one."""

    def __init__(self, channels: int, norm: Callable[[int], GroupNorm], head_dim: int | None):
        super().__init__()
        self.head_dim = head_dim or channels
        self.norm = norm(channels)
        self.query = nn.Conv2d(channels, channels, 1)
        self.key = nn.Conv2d(channels, channels, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q = self.heads(self.query(h))
        k = self.heads(self.key(h))
        v = self.heads(self.value(h))
        h = F.scaled_dot_product_attention(q, k, v)  # (B, heads, H W, head_dim)

        h = h.transpose(2, 3)  # (B, heads, head_dim, H W)
        h = h.reshape(x.shape)  # (B, C, H, W)
        return x + self.out(h)

    def heads(self, x: Tensor) -> Tensor:
        """Cut the channels of x (B, C, H, W) into heads: (B, heads, H W, head_dim)."""
        x = x.unflatten(1, (-1, self.head_dim))  # (B, heads, head_dim, H, W)
        return x.flatten(3).transpose(2, 3)


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2, which halves H and W: (B, C, H, W) -> (B, C, H/2, W/2)."""

    def __init__(self, channels: int, padding: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        # Without padding in the convolution, the image is padded at the right and the bottom only,
        # as in Ho's code.
        if self.conv.padding[0] == 0:
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest-neighbour doubling and a 3x3 convolution: (B, C, H, W) -> (B, C, 2H, 2W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x)
