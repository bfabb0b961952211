"""The U-Net's parts: residual block, self-attention, down- and upsampling (Ho et al. 2020, Appendix B, and their code).

B = batch, C = channels, H, W = height, width. Every block keeps H and W but `Downsample` and `Upsample`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.norm_silu import NORM_EPS
from models.residual import Layer, NormSiluConv, Residual, Settings


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
        self.conv_2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.settings = Settings(norm_groups, dropout)

    def reset_parameters(self) -> None:
        init_fan_average(self.conv_1)
        init_fan_average(self.time_projection)
        init_zero(self.conv_2)
        if self.shortcut:
            init_fan_average(self.shortcut)

    def forward(self, time_embedding: Tensor, *parts: Tensor) -> Tensor:
        """The parts (B, C_i, H, W) are concatenated to in_channels -> (B, out_channels, H, W)."""
        dtype = compute_dtype(parts[0])
        shift = self.time_projection(F.silu(time_embedding))  # (B, C_out), added over the image
        shortcut = parameters_in(self.shortcut, dtype) if self.shortcut else (None, None)
        settings = self.settings if self.training else self.settings._replace(dropout=0.0)
        if not torch.is_grad_enabled():
            settings = settings._replace(recompute="norms")  # keeps nothing longer than it is needed
        return Residual.apply(
            settings, shift.to(dtype), *layer_of(self.norm_1, self.conv_1, dtype),
            *layer_of(self.norm_2, self.conv_2, dtype), *shortcut, *(part.to(dtype) for part in parts),
        )  # fmt: skip


def norm_silu_conv(norm: nn.GroupNorm, conv: nn.Conv2d, x: Tensor, settings: Settings) -> Tensor:
    """conv(silu(norm(x))), which keeps x alone for backward."""
    dtype = compute_dtype(x)
    return NormSiluConv.apply(settings, x.to(dtype), *layer_of(norm, conv, dtype))


def layer_of(norm: nn.GroupNorm, conv: nn.Conv2d, dtype: torch.dtype) -> Layer:
    return Layer(norm.weight, norm.bias, *parameters_in(conv, dtype))


def parameters_in(conv: nn.Conv2d, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight and bias as autocast would hand them to the convolution."""
    return conv.weight.to(dtype), conv.bias.to(dtype)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type to convolve in: autocast's where it is on, which own autograd functions have to ask for."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # not on the meta device
    return torch.get_autocast_dtype(kind) if on else x.dtype


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


WORTH_DOUBLING = 256  # pixels of an image; of fewer, summing up the kernels costs more than it saves


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C, 2H, 2W): nearest neighbour, then a 3x3 convolution; both in one.

    Each output pixel sees a 3x3 window of an image in which every pixel is there four times, hence 2x2 different ones.
    So the same function is a transposed convolution of stride 2 whose 4x4 kernel holds sums of the 3x3 one's weights:
    4/9 of the operations, and no input of twice the size is made or kept.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def reset_parameters(self) -> None:
        init_fan_average(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] * x.shape[3] < WORTH_DOUBLING:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return F.conv_transpose2d(x, doubled_kernel(self.conv.weight), self.conv.bias, stride=2, padding=1)


def doubled_kernel(weight: Tensor) -> Tensor:
    """3x3 kernels (C_out, C_in, 3, 3), applied after doubling -> (C_in, C_out, 4, 4), that of a transposed convolution.

    In one dimension pixel i becomes pixels 2i and 2i + 1, and output o takes weight d of the doubled pixel o + d - 1.
    So of pixel i, output 2i - 1 takes weight 2; output 2i weights 1 and 2; 2i + 1 weights 0 and 1; 2i + 2 weight 0.
    """
    for dim in (2, 3):
        first, second, third = weight.unbind(dim)
        weight = torch.stack([third, second + third, first + second, first], dim)
    return weight.transpose(0, 1)
