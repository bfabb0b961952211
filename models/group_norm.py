"""Group norm that is fast for images in channels_last.

PyTorch's group norm can be slow in this layout on the CPU, and copies images when it is compiled.
In shapes, N is the batch, C the channels, H and W height and width.
"""

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable

# PyTorch's group norm is faster for groups of at least this many channels. For groups of 2, at
# 128 x 128 pixels, the code below is 5 times as fast as PyTorch's.
WIDE_GROUP = 16


class GroupNorm(nn.GroupNorm):
    """Normalize like `nn.GroupNorm` with a weight and a bias, but avoid its slow cases."""

    def forward(self, x: Tensor) -> Tensor:
        arguments = (x, self.weight, self.bias, self.num_groups, self.eps)
        if torch.compiler.is_compiling():
            return channels_last_group_norm(*arguments)

        # PyTorch normalizes images of one channel or one pixel, which have both layouts at once.
        channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        narrow = self.num_channels // self.num_groups < WIDE_GROUP
        if x.device.type == "cpu" and channels_last and narrow:
            return ChannelsLastGroupNorm.apply(*arguments)
        return super().forward(x)


def channels_last_group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> Tensor:
    """Compute the group norm of x in channels_last, by operations that a compiler fuses."""
    # PyTorch's view (N, groups, C / groups, H, W) would copy x to the other layout, and its output
    # would be copied back.
    N, C, H, W = x.shape
    pixels = x.permute(0, 2, 3, 1).reshape(N, H * W, C).to(weight.dtype)

    # These are the statistics of each channel: (N, groups, C / groups).
    variances, means = torch.var_mean(pixels, dim=1, correction=0)
    variances = variances.view(N, groups, -1)
    means = means.view(N, groups, -1)

    # The variance of a group is the mean of its channels' variances, plus the variance of their
    # means.
    variance = variances.mean(2, keepdim=True) + means.var(2, correction=0, keepdim=True)
    mean = means.mean(2, keepdim=True).expand_as(means).reshape(N, 1, C)
    scale = torch.rsqrt(variance + eps) * weight.view(groups, -1)
    z = (pixels - mean) * scale.reshape(N, 1, C) + bias
    return z.to(x.dtype).reshape(N, H, W, C).permute(0, 3, 1, 2)


class ChannelsLastGroupNorm(Function):
    """Run PyTorch's forward kernel, and a backward pass of whole-tensor operations in x's dtype.

    x may be in half precision beside float32 parameters, as under autocast.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
    ) -> Tensor:
        N, C, H, W = x.shape
        z, mean, rstd = torch.ops.aten.native_group_norm(x, weight, bias, N, C, H * W, groups, eps)
        # The mean and 1 / std are (N, groups), in float32 or better.
        ctx.save_for_backward(x, weight, mean, rstd)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_z: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight and bias.

        With x_hat = (x - mean) * rstd, the gradient of x is

            grad_x = rstd * (weight * grad_z - mean_1 - x_hat * mean_x)

        where mean_1 and mean_x are the means over a group of weight * grad_z and of
        weight * grad_z * x_hat.
        """
        x, weight, mean, rstd = ctx.saved_tensors
        N, C, H, W = x.shape
        groups = mean.shape[1]
        ones = x.new_ones(N, 1, H * W)

        def per_group(values):
            """Return values of groups or channels as (N, groups, 1 or C / groups)."""
            return values.to(weight.dtype).view(N, groups, -1)

        def per_pixel(values):
            """Return values of `per_group` as (N, C, 1, 1) in x's dtype, to multiply x with."""
            values = values.expand(N, groups, C // groups)
            return values.reshape(N, C, 1, 1).to(x.dtype)

        def sum_over_pixels(values):
            """Return the sums of (N, C, H, W) over the pixels: (N, groups, C / groups)."""
            # In this layout a matrix product is the fastest sum.
            pixels = values.permute(0, 2, 3, 1).reshape(N, H * W, C)
            return per_group(torch.bmm(ones, pixels))

        mean = per_group(mean)
        rstd = per_group(rstd)

        # Sums over pixels are rounded to x's dtype, and a small difference of large sums would be
        # only rounding error. So x is centred before it is summed, by the mean in x's dtype. What
        # rounding took from the mean is subtracted from the sums.
        rounded_mean = mean.to(x.dtype)
        rest = mean - rounded_mean
        centred = x - per_pixel(rounded_mean)

        # These are the sums of grad_z, and of grad_z * x_hat.
        sum_1 = sum_over_pixels(grad_z)
        sum_x = (sum_over_pixels(grad_z * centred) - rest * sum_1) * rstd

        scale = weight.view(groups, -1)
        size = C // groups * H * W
        mean_1 = (scale * sum_1).sum(2, keepdim=True) / size
        mean_x = (scale * sum_x).sum(2, keepdim=True) / size

        # With x_hat = (centred - rest) * rstd, the formula above is a sum of grad_z, centred and 1,
        # each times one of these factors.
        of_grad_z = scale * rstd
        of_centred = -mean_x * rstd.square()
        of_1 = -mean_1 * rstd - of_centred * rest

        # The result overwrites `centred`, which is not needed any more.
        grad_x = torch.addcmul(per_pixel(of_1), centred, per_pixel(of_centred), out=centred)
        grad_x.addcmul_(grad_z, per_pixel(of_grad_z))
        grad_weight = sum_x.sum(0).flatten()
        grad_bias = sum_1.sum(0).flatten()
        return grad_x, grad_weight, grad_bias, None, None
