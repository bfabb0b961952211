"""The U-Net's parts: residual block, self-attention, down- and upsampling (Ho et al. 2020, Appendix B, and their code).

B = batch, C = channels, H, W = height, width. Every block keeps H and W but `Downsample` and `Upsample`.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6  # TensorFlow's default, which the paper's weights were trained with; PyTorch's is 1e-5


def init_fan_average(layer: nn.Module) -> nn.Module:
    """Ho's initialisation, in place: weights uniform with variance 1 / mean(fan_in, fan_out), zero biases.

    This is Glorot's: `variance_scaling(1, 'fan_avg', 'uniform')` in TensorFlow, `xavier_uniform_` in PyTorch.
    """
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def init_zero(layer: nn.Module) -> nn.Module:
    """All zeros, in place: for the last layer of a residual branch, so that the block starts as the identity."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    """Norm-SiLU-conv twice around the added time embedding, plus a shortcut (a 1x1 convolution when channels change).

    Args:
        in_channels, out_channels: both divisible by `norm_groups`.
        time_dim: size of the time embedding.
        dropout: probability, before the second convolution.
        norm_groups: groups of both GroupNorms.
    """

    def __init__(self, in_channels: int, out_channels: int, time_dim: int, dropout: float, norm_groups: int):
        super().__init__()
        self.norm_1 = nn.GroupNorm(norm_groups, in_channels, eps=NORM_EPS)
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_projection = nn.Linear(time_dim, out_channels)
        self.norm_2 = nn.GroupNorm(norm_groups, out_channels, eps=NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def reset_parameters(self) -> None:
        init_fan_average(self.conv_1)
        init_fan_average(self.time_projection)
        init_zero(self.conv_2)
        if isinstance(self.shortcut, nn.Conv2d):
            init_fan_average(self.shortcut)

    def forward(self, x: Tensor, time_embedding: Tensor) -> Tensor:
        h = self.conv_1(F.silu(self.norm_1(x)))  # (B, C_out, H, W)
        h = h + self.time_projection(F.silu(time_embedding))[:, :, None, None]  # (B, C_out, 1, 1) over the image
        h = self.conv_2(self.dropout(F.silu(self.norm_2(h))))  # (B, C_out, H, W)
        return self.shortcut(x) + h


class SelfAttention(nn.Module):
    """One head of self-attention over all H x W positions, with a residual connection."""

    def __init__(self, channels: int, norm_groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels, eps=NORM_EPS)
        self.query = nn.Conv2d(channels, channels, 1)
        self.key = nn.Conv2d(channels, channels, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def reset_parameters(self) -> None:
        for layer in (self.query, self.key, self.value):
            init_fan_average(layer)
        init_zero(self.out)

    def forward(self, x: Tensor) -> Tensor:
        _, C, H, W = x.shape
        h = self.norm(x)
        q, k, v = (
            layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (self.query, self.key, self.value)
        )  # each (B, 1 head, H W, C)
        h = F.scaled_dot_product_attention(q, k, v, scale=1 / math.sqrt(C))  # (B, 1, H W, C)
        h = h[:, 0].transpose(1, 2).reshape(-1, C, H, W)  # (B, C, H, W)
        return x + self.out(h)


class Downsample(nn.Module):
    """(B, C, H, W) -> (B, C, H/2, W/2): a 3x3 convolution of stride 2."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def reset_parameters(self) -> None:
        init_fan_average(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only: TensorFlow's 'SAME' for an even size


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C, 2H, 2W): nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def reset_parameters(self) -> None:
        init_fan_average(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
