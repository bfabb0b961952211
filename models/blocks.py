"""The parts of the U-Net: time embedding, residual block, self-attention and resampling.

They follow Ho et al. 2020 (Appendix B, and the released code). In shapes, B is the batch, C the
channels, H and W height and width. All blocks except `Downsample` and `Upsample` keep H and W.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.dialects import DIALECTS, Dialect
from models.group_norm import GroupNorm

Norm = Callable[[int], GroupNorm]

# `Upsample` fuses doubling and convolution for images of at least this many pixels. For smaller
# images, building the fused kernel costs more than it saves.
MIN_FUSED_PIXELS = 256


def recomputing(recompute: bool, part: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Return `part(*inputs)`. With `recompute`, only the inputs are kept, and backward repeats it.

    This is activation checkpointing (Chen et al. 2016, arXiv:1604.06174).
    """
    # Backward repeats the part only up to the last tensor that it needs. For a convolution it needs
    # the input and not the output, so of "norm, SiLU, convolution" it repeats no convolution.
    if recompute and torch.is_grad_enabled():
        return checkpoint(part, *inputs, use_reentrant=False)
    return part(*inputs)


def sinusoidal_embedding(t: Tensor, dim: int, dialect: Dialect = DIALECTS["ho"]) -> Tensor:
    """Embed timesteps (B,) as sines and cosines of many frequencies: (B, dim) float32.

    This is Section 3.5 of "Attention Is All You Need" in the form of Ho's code: all sines first,
    then all cosines, with the frequencies 10000^(-i / (dim/2 - 1)) for i = 0 .. dim/2 - 1, which
    fall from 1 to exactly 1/10000. In the dialect of diffusers the cosines come first, and dim/2
    replaces dim/2 - 1. Raises ValueError unless dim is even and at least 4.
    """
    if dim < 4 or dim % 2:
        raise ValueError(f"the embedding's dim is {dim}; it must be even and at least 4")
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
    """An embedding of timesteps (B,) as (B, 4 base_dim): sinusoid, Linear, SiLU, Linear.

    Every residual block adds a projection of the result.
    """

    def __init__(self, base_dim: int, dialect: Dialect):
        super().__init__()
        self.base_dim = base_dim
        self.dialect = dialect
        self.linear_1 = nn.Linear(base_dim, 4 * base_dim)
        self.linear_2 = nn.Linear(4 * base_dim, 4 * base_dim)

    def forward(self, t: Tensor) -> Tensor:
        # The sinusoid stays float32 under autocast: bfloat16 would round large timesteps.
        embedding = sinusoidal_embedding(t, self.base_dim, self.dialect)  # (B, base_dim)
        h = F.silu(self.linear_1(embedding))
        return self.linear_2(h)  # (B, 4 base_dim)


class ResidualBlock(nn.Module):
    """Norm, SiLU and convolution, twice, plus a shortcut.

    A projection of the time embedding is added after the first convolution. Dropout precedes the
    second one. The shortcut is a 1x1 convolution where the number of channels changes.
    `norm(channels)` returns a GroupNorm.
    """

    # `UNet.set_recompute` changes this.
    recompute_norms = False

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
        self.shortcut = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, time_embedding: Tensor, *parts: Tensor) -> Tensor:
        """Map parts (B, C_i, H, W), whose C_i add up to in_channels, to (B, out_channels, H, W)."""
        call = partial(recomputing, self.recompute_norms)
        # With `recompute_norms` the shortcut and the first layer each concatenate the parts, so the
        # concatenation is not kept for backward.
        if not self.recompute_norms:
            parts = [concatenate(*parts)]
        shortcut = call(lambda *parts: self.shortcut(concatenate(*parts)), *parts)
        h = call(self.first_layer, *parts)
        h = h + self.time_projection(F.silu(time_embedding))[:, :, None, None]
        h = call(self.second_layer, h)
        return h + shortcut

    def first_layer(self, *parts: Tensor) -> Tensor:
        h = self.norm_1(concatenate(*parts))
        h = F.silu(h)
        return self.conv_1(h)

    def second_layer(self, h: Tensor) -> Tensor:
        h = F.silu(self.norm_2(h))
        h = self.dropout(h)
        return self.conv_2(h)


def concatenate(*parts: Tensor) -> Tensor:
    """Concatenate parts (B, C_i, H, W) to (B, sum of C_i, H, W)."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class SelfAttention(nn.Module):
    """Self-attention over all H x W positions, added to its input.

    `head_dim` is the number of channels per head; None means one head. Raises ValueError if
    `head_dim` does not divide `channels`.
    """

    # `UNet.set_recompute` changes this.
    recompute_norms = False

    def __init__(self, channels: int, norm: Norm, head_dim: int | None = None):
        super().__init__()
        self.head_dim = head_dim or channels
        if channels % self.head_dim:
            raise ValueError(f"{channels} channels cannot be cut into heads of {self.head_dim}")
        self.norm = norm(channels)
        self.query = nn.Conv2d(channels, channels, 1)
        self.key = nn.Conv2d(channels, channels, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[2:]
        qkv = recomputing(self.recompute_norms, self.queries_keys_values, x)  # (B, 3 C, H, W)
        qkv = qkv.flatten(2).transpose(1, 2)  # (B, H W, 3 C)
        qkv = qkv.unflatten(2, (3, -1, self.head_dim))  # (B, H W, 3, heads, head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, H W, head_dim)
        h = F.scaled_dot_product_attention(q, k, v)
        h = h.transpose(1, 2).flatten(2)  # (B, H W, C)
        h = h.transpose(1, 2).unflatten(2, (H, W))  # (B, C, H, W)
        return x + self.out(h)

    def queries_keys_values(self, x: Tensor) -> Tensor:
        """Normalise x (B, C, H, W) and return its queries, keys and values: (B, 3 C, H, W)."""
        # The three layers run as one convolution. When backward recomputes the norm, it repeats all
        # convolutions after it except the last: two of three, but none of one.
        layers = (self.query, self.key, self.value)
        weight = torch.cat([layer.weight for layer in layers])
        bias = torch.cat([layer.bias for layer in layers])
        return F.conv2d(self.norm(x), weight, bias)


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
    """Nearest-neighbour doubling of height and width, followed by a 3x3 convolution.

    (B, C, H, W) -> (B, C, 2H, 2W).
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] * x.shape[3] < MIN_FUSED_PIXELS:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))

        # The doubled image has every pixel four times, so a 3x3 window of it has only 2x2 different
        # pixels. So doubling and convolution together equal one transposed convolution of stride 2,
        # whose 4x4 kernel has sums of the weights. It needs 4/9 of the operations, and no doubled
        # image is kept for backward.
        kernel = fused_kernel(self.conv.weight)
        return F.conv_transpose2d(x, kernel, self.conv.bias, stride=2, padding=1)


def fused_kernel(weight: Tensor) -> Tensor:
    """Return the kernel of the transposed convolution that doubles an image and convolves it.

    `weight` is (C_out, C_in, 3, 3), the kernel for the doubled image. The result is
    (C_in, C_out, 4, 4).
    """
    # In one dimension, pixel i becomes the doubled pixels 2i and 2i + 1, and output o applies
    # weight d to the doubled pixel o + d - 1. So pixel i gets
    #     in output 2i - 1: weight 2,
    #     in output 2i:     weights 1 and 2,
    #     in output 2i + 1: weights 0 and 1,
    #     in output 2i + 2: weight 0.
    for dim in (2, 3):
        first, second, third = weight.unbind(dim)
        weight = torch.stack([third, second + third, first + second, first], dim)
    return weight.transpose(0, 1)
