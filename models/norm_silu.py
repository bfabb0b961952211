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

FEW_PIXELS = 256  # of an image; up to here PyTorch's own backward pass, from a contiguous copy, is as fast
NORM_EPS = 1e-6  # TensorFlow's default, which the paper's weights were trained with; PyTorch's is 1e-5


class Kernels(NamedTuple):
    """What a norm with activation does in a forward and a backward pass; `x` may be in half precision.

    forward   (x, weight, bias, groups, keep_z) -> a, z, mean, rstd; z may be None unless it is to be kept
    again     (x, mean, rstd, weight, bias, groups) -> a, z: what forward did not keep
    backward  (grad_a, x, z, mean, rstd, weight, bias, groups) -> grad_x, grad_weight (C,), grad_bias (C,); it may
              overwrite grad_a
    """

    forward: Callable
    again: Callable
    backward: Callable


def plain_forward(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    variance, mean = torch.var_mean(grouped(x, groups), dim=(2, 3, 4), correction=0)
    rstd = torch.rsqrt(variance + NORM_EPS)
    return plain_again(x, mean, rstd, weight, bias, groups), mean, rstd


def plain_again(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    _, z = plain_norm(x, mean, rstd, weight, bias, groups)
    return F.silu(z).to(x.dtype).reshape(x.shape)


def plain_backward(
    grad_a: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, groups: int
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
    if has_cpu_kernels(x) and is_channels_last(x) and x.shape[2] * x.shape[3] > FEW_PIXELS:
        return channels_last_backward(grad_z, x, mean, rstd, weight, groups)
    N, C, H, W = x.shape
    dtype = x.dtype if has_cpu_kernels(x) else weight.dtype
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_group_norm_backward(
        grad_z.to(dtype).contiguous(), x.to(dtype).contiguous(), mean, rstd, weight, N, C, H * W, groups,
        [True, True, True],
    )  # fmt: skip
    return like(x, grad_x), grad_weight, grad_bias


def channels_last_backward(
    grad_z: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`plain_backward` behind the activation, in whole-tensor operations that keep x's type.

    PyTorch 2.13's own kernel for this layout walks through the groups pixel by pixel: for 64 channels at 128 x 128 it
    takes 8 times as long as all of this. The group's mean, as far as x's type can hold it, is subtracted first: the
    sums are rounded to that type, and what is left of a small difference of large ones would be rounding.
    """
    N, C, H, W = x.shape
    per_group = lambda values: values.to(weight.dtype).view(N, groups, -1)  # (N, groups, 1 or C / groups)
    per_pixel = lambda values: values.expand(N, groups, C // groups).reshape(N, C, 1, 1).to(x.dtype)
    mean, rstd = per_group(mean), per_group(rstd)
    subtracted = mean.to(x.dtype)
    left = mean - subtracted
    centred = x - per_pixel(subtracted)
    ones = x.new_ones(N, 1, H * W)
    over_pixels = lambda tensor: per_group(torch.bmm(ones, tensor.permute(0, 2, 3, 1).reshape(N, H * W, C))[:, 0])
    sum_1 = over_pixels(grad_z)
    sum_x = (over_pixels(grad_z * centred) - left * sum_1) * rstd  # of grad_z * x_hat
    scale, count = weight.view(groups, -1), x[0].numel() // groups
    mean_1, mean_x = ((scale * s).sum(2, keepdim=True) / count for s in (sum_1, sum_x))
    # grad_x = rstd * (weight * grad_z - mean_1 - x_hat * mean_x), with x_hat = (centred - left) * rstd written out
    of_centred = -mean_x * rstd.square()
    of_1 = -mean_1 * rstd - of_centred * left
    grad_x = torch.addcmul(per_pixel(of_1), centred, per_pixel(of_centred), out=centred)
    return grad_x.addcmul_(grad_z, per_pixel(scale * rstd)), sum_x.sum(0).flatten(), sum_1.sum(0).flatten()


def without_z(forward: Callable, again: Callable, backward: Callable) -> Kernels:
    """Kernels of functions that make z where they need it, and hand it to nobody."""

    def forward_and_z(x: Tensor, weight: Tensor, bias: Tensor, groups: int, keep_z: bool = False) -> tuple:
        a, mean, rstd = forward(x, weight, bias, groups)
        return a, None, mean, rstd

    return Kernels(
        forward_and_z,
        lambda *args: (again(*args), None),
        lambda grad_a, x, z, *args: backward(grad_a, x, *args),
    )


PLAIN_FUNCTIONS = plain_forward, plain_again, plain_backward
PLAIN = without_z(*PLAIN_FUNCTIONS)
EAGER = Kernels(eager_forward, eager_again, eager_backward)


@cache
def compiled_kernels() -> Kernels:
    """`PLAIN`, each function compiled when it is first called, once for most sizes."""
    # Again for some: where sizes are equal by chance, or autocast is on in the forward pass and off in backward
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)

    def compiled(function: Callable) -> Callable:
        kernel = torch.compile(function, dynamic=True)

        def call(x: Tensor, *args: Tensor | int) -> Tensor | tuple[Tensor, ...]:
            if x.shape[0] == 1:  # it would be compiled once more, perhaps in the middle of a training
                return function(x, *args)
            # Detached, for it would also be compiled once more for tensors that require gradients
            return kernel(x.detach(), *(arg.detach() if isinstance(arg, Tensor) else arg for arg in args))

        return call

    return without_z(*map(compiled, PLAIN_FUNCTIONS))


def check_compiled(channels: int, size: int, groups: int, device: torch.device, dtype: torch.dtype) -> None:
    """`ArithmeticError` unless the compiled kernels do what the plain ones do, for 2 images in channels_last."""
    x, grad_a = (
        torch.randn(2, channels, size, size, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    )
    weight, bias = (torch.randn(channels, device=device) for _ in range(2))
    found = []
    for kernels in (compiled_kernels(), PLAIN):
        a, _, mean, rstd = kernels.forward(x, weight, bias, groups)
        again, _ = kernels.again(x, mean, rstd, weight, bias, groups)
        found.append([a, again, *kernels.backward(grad_a, x, None, mean, rstd, weight, bias, groups)])
    for ours, plain in zip(*found, strict=True):
        error = ((ours.float() - plain.float()).norm() / plain.float().norm()).item()
        if not error < 0.01:  # nan too
            raise ArithmeticError(f"{channels} channels at {size} x {size} are off by {error:.2g} of their norm")


def native_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's group norm: z in x's type and layout, mean and rstd in float32, as the statistics are."""
    N, C, H, W = x.shape
    if has_cpu_kernels(x):
        in_one_piece = x if is_channels_last(x) else x.contiguous()
        return torch.ops.aten.native_group_norm(in_one_piece, weight, bias, N, C, H * W, groups, NORM_EPS)
    z, mean, rstd = torch.ops.aten.native_group_norm(
        x.to(weight.dtype).contiguous(), weight, bias, N, C, H * W, groups, NORM_EPS
    )
    return like(x, z), mean, rstd


def has_cpu_kernels(x: Tensor) -> bool:
    """Whether PyTorch's group norm takes an x in half precision with float32 weights, and in channels_last.

    Only the CPU's does. The others want one type for all, which is float32 here for the statistics' sake, and
    contiguous tensors.
    """
    return x.device.type == "cpu"


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def like(x: Tensor, tensor: Tensor) -> Tensor:
    """A tensor in x's type and memory layout."""
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return tensor.to(x.dtype).contiguous(memory_format=layout)
