"""Group norm for channels_last, where PyTorch's own can be slow on the CPU, and compiled copies to and fro."""

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable

# Channels of a group: from here on PyTorch's is the faster; with 2, at 128 x 128, ours is 5 times
# as fast
WIDE = 16


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm`: same arguments, parameters and numbers, and the same code but in the two cases that are slow."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and self.affine:
            return in_memory_order(x, self.weight, self.bias, self.num_groups, self.eps)
        channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        if (
            x.device.type == "cpu"
            and channels_last
            and self.affine
            and self.num_channels // self.num_groups < WIDE
        ):
            return ChannelsLastGroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)
        return super().forward(x)


def in_memory_order(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """For compilers: PyTorch's view of (N, groups, C / groups, H, W) needs copies, to the other layout and back."""
    N, C, H, W = x.shape
    pixels = x.permute(0, 2, 3, 1).reshape(N, H * W, C).to(weight.dtype)
    statistics = torch.var_mean(pixels, dim=1, correction=0)  # of the channels
    variances, means = (values.view(N, groups, -1) for values in statistics)
    variance = variances.mean(2, keepdim=True) + means.var(2, correction=0, keepdim=True)
    mean = means.mean(2, keepdim=True).expand_as(means).reshape(N, 1, C)
    scale = (torch.rsqrt(variance + eps) * weight.view(groups, -1)).reshape(N, 1, C)
    z = (pixels - mean) * scale + bias
    return z.to(x.dtype).reshape(N, H, W, C).permute(0, 3, 1, 2)


class ChannelsLastGroupNorm(Function):
    """PyTorch's forward kernel, and a backward pass in whole-tensor operations that keep x's type.

    x may be in half precision beside float32 parameters, as under autocast.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
    ) -> Tensor:
        N, C, H, W = x.shape
        z, mean, rstd = torch.ops.aten.native_group_norm(x, weight, bias, N, C, H * W, groups, eps)
        # Mean and rstd (N, groups), in float32 at least
        ctx.save_for_backward(x, weight, mean, rstd)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_z: Tensor) -> tuple[Tensor | None, ...]:
        """grad_x = rstd * (weight * grad_z - mean_1 - x_hat * mean_x), with x_hat = (x - mean) * rstd.

        mean_1 and mean_x are the means over a group of weight * grad_z and of weight * grad_z * x_hat. The group's
        mean, as far as x's type can hold it, is subtracted first: the sums over pixels are rounded to that type, and
        what is left of a small difference of large ones would be rounding.
        """
        x, weight, mean, rstd = ctx.saved_tensors
        (N, C, H, W), groups = x.shape, mean.shape[1]

        def per_group(values: Tensor) -> Tensor:  # -> (N, groups, 1 or C / groups)
            return values.to(weight.dtype).view(N, groups, -1)

        def per_pixel(values: Tensor) -> Tensor:  # -> (N, C, 1, 1), to multiply x with
            return values.expand(N, groups, C // groups).reshape(N, C, 1, 1).to(x.dtype)

        # Sums; as a matrix product, the fastest way in this layout
        def over_pixels(tensor: Tensor) -> Tensor:
            return per_group(torch.bmm(ones, tensor.permute(0, 2, 3, 1).reshape(N, H * W, C))[:, 0])

        ones = x.new_ones(N, 1, H * W)
        mean, rstd = per_group(mean), per_group(rstd)
        subtracted = mean.to(x.dtype)
        rest = mean - subtracted
        centred = x - per_pixel(subtracted)
        sum_1 = over_pixels(grad_z)
        sum_x = (over_pixels(grad_z * centred) - rest * sum_1) * rstd  # of grad_z * x_hat
        scale = weight.view(groups, -1)
        mean_1, mean_x = (
            (scale * s).sum(2, keepdim=True) / (C // groups * H * W) for s in (sum_1, sum_x)
        )
        # the formula above with x_hat = (centred - rest) * rstd, ordered by what it multiplies
        of_centred = -mean_x * rstd.square()
        of_1 = -mean_1 * rstd - of_centred * rest
        grad_x = torch.addcmul(per_pixel(of_1), centred, per_pixel(of_centred), out=centred)
        grad_x.addcmul_(grad_z, per_pixel(scale * rstd))
        return grad_x, sum_x.sum(0).flatten(), sum_1.sum(0).flatten(), None, None
