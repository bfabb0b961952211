"""The U-Net's parts (Ho et al. 2020, Appendix B, and code): time embedding, residual block, attention, resampling.

B = batch, C = channels, H, W = height, width. Every block keeps H and W but `Downsample` and `Upsample`.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from functions.support.dialects import DIALECTS, Dialect
from models.group_norm import GroupNorm

Norm = Callable[[int], GroupNorm]
# Pixels, in `Upsample`; of fewer, summing up the kernels costs more than it saves
WORTH_DOUBLING = 256


def recomputing(wanted: bool, part: Callable[..., Tensor], *inputs: object) -> Tensor:
    """`part(*inputs)`; if `wanted`, only the inputs are kept, and backward computes again what it needs.

    PyTorch's checkpoint (Chen et al. 2016, arXiv:1604.06174) repeats the part up to the last tensor that backward
    needs: of "norm, SiLU, convolution" not the convolution, whose backward needs its input and not its output.
    """
    if wanted and torch.is_grad_enabled():
        return checkpoint(part, *inputs, use_reentrant=False)
    return part(*inputs)


def sinusoidal_embedding(t: Tensor, dim: int, dialect: Dialect = DIALECTS["ho"]) -> Tensor:
    """Timesteps (B,) -> (B, dim) float32: sines and cosines of geometrically spaced frequencies.

    "Attention Is All You Need", Section 3.5, in the form of Ho's code: all sines first, then all cosines, with
    frequencies 10000^(-i / (dim/2 - 1)) for i = 0 .. dim/2 - 1, hence from 1 down to exactly 1/10000. The dialect of
    diffusers has the cosines first, and dim/2 in the place of dim/2 - 1. `ValueError` unless dim is even, 4 or more.
    """
    if dim < 4 or dim % 2:
        raise ValueError(f"the embedding's dim is {dim}; it must be even and at least 4")
    half_dim = dim // 2
    exponent = torch.arange(half_dim, dtype=torch.float32, device=t.device) / (
        half_dim - dialect.freq_shift
    )
    angles = t.float()[:, None] * torch.exp(-math.log(10_000) * exponent)[None, :]  # (B, dim/2)
    halves = (
        (angles.cos(), angles.sin()) if dialect.flip_sin_to_cos else (angles.sin(), angles.cos())
    )
    return torch.cat(halves, dim=1)  # (B, dim)


class TimeEmbedding(nn.Module):
    """t (B,) -> (B, 4 base_dim): sinusoid, Linear, SiLU, Linear. Every residual block adds a projection of it."""

    def __init__(self, base_dim: int, dialect: Dialect):
        super().__init__()
        self.base_dim, self.dialect = base_dim, dialect
        self.linear_1 = nn.Linear(base_dim, 4 * base_dim)
        self.linear_2 = nn.Linear(4 * base_dim, 4 * base_dim)

    def forward(self, t: Tensor) -> Tensor:
        # (B, base_dim), float32 under autocast too
        embedding = sinusoidal_embedding(t, self.base_dim, self.dialect)
        return self.linear_2(F.silu(self.linear_1(embedding)))  # (B, 4 base_dim)


class ResidualBlock(nn.Module):
    """Norm-SiLU-conv twice around the added time embedding, plus a shortcut (a 1x1 convolution when channels change).

    `norm` makes a GroupNorm of as many channels as it is given; dropout precedes the second convolution.
    """

    def __init__(
        self, in_channels: int, out_channels: int, time_dim: int, dropout: float, norm: Norm
    ):
        super().__init__()
        self.norm_1 = norm(in_channels)
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_projection = nn.Linear(time_dim, out_channels)
        self.norm_2 = norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = (
            nn.Conv2d(in_channels, out_channels, 1)
            if in_channels != out_channels
            else nn.Identity()
        )
        self.recompute_norms = False  # see `UNet.set_recompute`

    def forward(self, time_embedding: Tensor, *parts: Tensor) -> Tensor:
        """The parts (B, C_i, H, W) are concatenated to in_channels -> (B, out_channels, H, W).

        With `recompute_norms` the shortcut and the first layer each concatenate them, so that nothing of it is kept.
        """
        run = partial(recomputing, self.recompute_norms)
        x = parts if self.recompute_norms else [concatenated(*parts)]
        shortcut = run(lambda *parts: self.shortcut(concatenated(*parts)), *x)
        h = run(lambda *parts: self.conv_1(F.silu(self.norm_1(concatenated(*parts)))), *x)
        h = h + self.time_projection(F.silu(time_embedding))[:, :, None, None]
        h = run(lambda h: self.conv_2(self.dropout(F.silu(self.norm_2(h)))), h)
        return h + shortcut


def concatenated(*parts: Tensor) -> Tensor:
    """Parts (B, C_i, H, W) -> (B, sum of C_i, H, W)."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class SelfAttention(nn.Module):
    """Self-attention over all H x W positions, with a residual connection; `ValueError` if no heads are so wide."""

    def __init__(self, channels: int, norm: Norm, head_dim: int | None = None):
        super().__init__()
        self.head_dim = head_dim or channels  # one head, as Ho's
        if channels % self.head_dim:
            raise ValueError(f"{channels} channels cannot be cut into heads of {self.head_dim}")
        self.norm = norm(channels)
        self.query = nn.Conv2d(channels, channels, 1)
        self.key = nn.Conv2d(channels, channels, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        self.recompute_norms = False

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[2:]
        qkv = recomputing(self.recompute_norms, self.queries_keys_values, x)  # (B, 3 C, H, W)
        # (B, H W, 3, heads, head_dim)
        qkv = qkv.flatten(2).transpose(1, 2).unflatten(2, (3, -1, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, H W, head_dim)
        # (B, heads, H W, head_dim)
        h = F.scaled_dot_product_attention(q, k, v, scale=1 / math.sqrt(self.head_dim))
        h = h.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, (H, W))  # (B, C, H, W)
        return x + self.out(h)

    def queries_keys_values(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 3 C, H, W): one convolution: of three, backward would repeat two."""
        layers = (self.query, self.key, self.value)
        weight, bias = (
            torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias")
        )
        return F.conv2d(self.norm(x), weight, bias)


class Downsample(nn.Module):
    """(B, C, H, W) -> (B, C, H/2, W/2): a 3x3 convolution of stride 2."""

    def __init__(self, channels: int, padding: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        # Right and bottom only
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C, 2H, 2W): nearest neighbour, then a 3x3 convolution; both in one.

    Each output pixel sees a 3x3 window of an image in which every pixel is there four times, hence 2x2 different ones.
    So the same function is a transposed convolution of stride 2 whose 4x4 kernel holds sums of the 3x3 one's weights:
    4/9 of the operations, and no input of twice the size is made or kept.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] * x.shape[3] < WORTH_DOUBLING:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return F.conv_transpose2d(
            x, doubled_kernel(self.conv.weight), self.conv.bias, stride=2, padding=1
        )


def doubled_kernel(weight: Tensor) -> Tensor:
    """3x3 kernels (C_out, C_in, 3, 3), applied after doubling -> (C_in, C_out, 4, 4), that of a transposed convolution.

    In one dimension pixel i becomes pixels 2i and 2i + 1, and output o takes weight d of the doubled pixel o + d - 1.
    So of pixel i, output 2i - 1 takes weight 2; output 2i weights 1 and 2; 2i + 1 weights 0 and 1; 2i + 2 weight 0.
    """
    for dim in (2, 3):
        first, second, third = weight.unbind(dim)
        weight = torch.stack([third, second + third, first + second, first], dim)
    return weight.transpose(0, 1)
