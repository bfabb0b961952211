"""silu(group_norm(x)), forward and backward, as plain functions: models/residual.py puts them around its convolutions.

Two versions of the same three functions, as `Kernels`. `PLAIN` is the mathematics, in float32 whatever the input's
type, to be compiled: then each is one or two passes over memory. `EAGER` calls PyTorch's own kernels.

x = input (N, C, H, W); z = group_norm(x) = weight * x_hat + bias; a = silu(z); mean, rstd (N, groups) are the groups'.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_PIXELS = 256  # of an image; up to here PyTorch's own backward pass is fast enough in channels_last
NORM_EPS = 1e-6  # TensorFlow's default, which the paper's weights were trained with; PyTorch's is 1e-5


class Kernels(NamedTuple):
    """What a norm with activation does in a forward and a backward pass; `x` may be in half precision.

    forward   (x, weight, bias, groups, keep_z) -> a, z, mean, rstd: z is None unless it is to be kept
    again     (x, mean, rstd, weight, bias, groups) -> a, z: what forward did not keep; z is None if backward needs none
    backward  (grad_a, x, z, mean, rstd, weight, bias, groups) -> grad_x, grad_weight (C,), grad_bias (C,); it may
              overwrite grad_a
    """

    forward: Callable
    again: Callable
    backward: Callable


def plain_forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, keep_z: bool = False
) -> tuple[Tensor, None, Tensor, Tensor]:
    variance, mean = torch.var_mean(grouped(x, groups), dim=(2, 3, 4), correction=0)
    rstd = torch.rsqrt(variance + NORM_EPS)
    a, _ = plain_again(x, mean, rstd, weight, bias, groups)
    return a, None, mean, rstd


def plain_again(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, groups: int
) -> tuple[Tensor, None]:
    _, z = plain_norm(x, mean, rstd, weight, bias, groups)
    return F.silu(z).to(x.dtype).reshape(x.shape), None


def plain_backward(
    grad_a: Tensor, x: Tensor, z: None, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    x_hat, z = plain_norm(x, mean, rstd, weight, bias, groups)
    sigmoid = torch.sigmoid(z)
    grad_z = grouped(grad_a, groups) * sigmoid * (1 + z * (1 - sigmoid))
    sum_1, sum_x = grad_z.sum((3, 4), keepdim=True), (grad_z * x_hat).sum((3, 4), keepdim=True)  # (N, G, C / G, 1, 1)
    # Mean and variance depend on every x of the group: two projections of the gradient are taken off it
    scale = per_channel(weight, groups)
    mean_1, mean_x = ((scale * s).sum(2, keepdim=True) / x_hat[0, 0].numel() for s in (sum_1, sum_x))
    grad_x = rstd[:, :, None, None, None] * (scale * grad_z - mean_1 - x_hat * mean_x)
    return grad_x.to(x.dtype).reshape(x.shape), sum_x.sum(0).flatten(), sum_1.sum(0).flatten()


def plain_norm(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    """x_hat and z, as (N, groups, C / groups, H, W)."""
    x_hat = (grouped(x, groups) - mean[:, :, None, None, None]) * rstd[:, :, None, None, None]
    return x_hat, x_hat * per_channel(weight, groups) + per_channel(bias, groups)


def grouped(x: Tensor, groups: int) -> Tensor:
    """(N, C, H, W) -> (N, groups, C / groups, H, W), in float32 at least."""
    N, C, H, W = x.shape
    return x.to(torch.promote_types(x.dtype, torch.float32)).reshape(N, groups, C // groups, H, W)


def per_channel(parameter: Tensor, groups: int) -> Tensor:
    """(C,) -> (groups, C / groups, 1, 1), to be broadcast over a grouped x."""
    return parameter.reshape(groups, parameter.shape[0] // groups, 1, 1)


def eager_forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, keep_z: bool = False
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    z, mean, rstd = native_norm(x, weight, bias, groups)
    return F.silu(z, inplace=not keep_z), z if keep_z else None, mean, rstd


def eager_again(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    z, _, _ = native_norm(x, weight, bias, groups)
    return F.silu(z), z


def eager_backward(
    grad_a: Tensor, x: Tensor, z: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    grad_z = torch.ops.aten.silu_backward.grad_input(grad_a, z, grad_input=grad_a)  # in place
    if x.device.type == "cpu" and is_channels_last(x) and x.shape[2] * x.shape[3] > FEW_PIXELS:
        return channels_last_backward(grad_z, x, mean, rstd, weight, groups)
    N, C, H, W = x.shape
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_group_norm_backward(
        grad_z.contiguous(), x.contiguous(), mean, rstd, one_type(weight, x), N, C, H * W, groups, [True, True, True]
    )
    return in_layout_of(x, grad_x), grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def channels_last_backward(
    grad_z: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`plain_backward` behind the activation, in whole-tensor operations that keep x's type.

    PyTorch 2.13's own kernel for this layout walks through the groups pixel by pixel: for 64 channels at 128 x 128 it
    takes 8 to 12 times as long as all of this.
    """
    N, C, H, W = x.shape
    rows = lambda tensor: tensor.permute(0, 2, 3, 1).reshape(N, H * W, C)  # a view
    ones = x.new_ones(N, 1, H * W)
    per_group = lambda sums: sums[:, 0].to(weight.dtype).view(N, groups, -1)  # (N, groups, C / groups)
    sum_1, sum_x = (per_group(torch.bmm(ones, rows(tensor))) for tensor in (grad_z, grad_z * x))
    mean, rstd = mean[:, :, None].to(weight.dtype), rstd[:, :, None].to(weight.dtype)
    sum_x = (sum_x - mean * sum_1) * rstd  # of grad_z * x_hat
    scale, count = weight.view(groups, -1), x[0].numel() // groups
    mean_1, mean_x = ((scale * s).sum(2, keepdim=True) / count for s in (sum_1, sum_x))
    # grad_x = rstd * (weight * grad_z - mean_1 - x_hat * mean_x), with x_hat written out
    of_x = -mean_x * rstd.square()
    of_1, of_x, of_z = (
        factor.expand(N, groups, C // groups).reshape(N, C, 1, 1).to(x.dtype)
        for factor in (-mean_1 * rstd - of_x * mean, of_x, scale * rstd)
    )
    grad_x = torch.addcmul(of_1, x, of_x).addcmul_(grad_z, of_z)
    return grad_x, sum_x.sum(0).flatten(), sum_1.sum(0).flatten()


PLAIN = Kernels(plain_forward, plain_again, plain_backward)
EAGER = Kernels(eager_forward, eager_again, eager_backward)


@cache
def compiled_kernels() -> Kernels:
    """`PLAIN`, each function compiled when it is first called, once for all sizes."""

    def compiled(function: Callable) -> Callable:
        kernel = torch.compile(function, dynamic=True)
        # Detached, for it would be compiled once more for tensors that require gradients
        return lambda *args: kernel(*(arg.detach() if isinstance(arg, Tensor) else arg for arg in args))

    return Kernels(*map(compiled, PLAIN))


def native_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's group norm: z, mean, rstd; statistics are float32 inside, in half precision too."""
    N, C, H, W = x.shape
    weight, bias = one_type(weight, x), one_type(bias, x)
    in_one_piece = x if x.device.type == "cpu" and is_channels_last(x) else x.contiguous()  # which CUDA insists on
    z, mean, rstd = torch.ops.aten.native_group_norm(in_one_piece, weight, bias, N, C, H * W, groups, NORM_EPS)
    return in_layout_of(x, z), mean, rstd


def one_type(parameter: Tensor, x: Tensor) -> Tensor:
    """The norm's weight or bias for PyTorch's kernels: only the CPU's take float32 ones with a half precision input."""
    return parameter if x.device.type == "cpu" else parameter.to(x.dtype)


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def in_layout_of(x: Tensor, tensor: Tensor) -> Tensor:
    """A tensor in the memory layout of x; only the CPU's kernels keep it by themselves."""
    return tensor.contiguous(memory_format=torch.channels_last if is_channels_last(x) else torch.contiguous_format)
