"""Group normalisation (Wu and He 2018), faster than PyTorch's in mixed precision."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class GroupNorm(nn.GroupNorm):
    """PyTorch's group norm. On CUDA its output has its input's dtype, and on a CPU it is faster."""

    def forward(self, x: Tensor) -> Tensor:
        if ChannelsLastNorm.is_faster(x, self):
            return ChannelsLastNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)
        if not x.is_cuda:
            return super().forward(x)
        # Under CUDA's autocast group norm would return float32, and its input and its output would
        # be kept for backward in float32, too. The kernel adds up in float32 for every dtype.
        with torch.autocast(x.device.type, enabled=False):
            weight = self.weight.to(x.dtype)
            bias = self.bias.to(x.dtype)
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class ChannelsLastNorm(torch.autograd.Function):
    """Group norm on a CPU, of bfloat16 in channels_last, with a faster backward than PyTorch's.

    If groups have few channels, PyTorch's takes longer than the convolutions (benchmarks/NOTES.md).
    This one rounds factors and the sums of a row to bfloat16, as grad itself is rounded.
    """

    @staticmethod
    def is_faster(x: Tensor, norm: nn.GroupNorm) -> bool:
        """Return whether `norm` of x (B, C, H, W) can be computed here, and in less time."""
        return (
            x.is_cpu
            and x.requires_grad
            and (x.dtype, norm.weight.dtype) == (torch.bfloat16, torch.float32)
            and x.is_contiguous(memory_format=torch.channels_last)
            # PyTorch's loop is fast where the channels of a group fill a register, and small images
            # take less time than the calls of this backward.
            and norm.num_channels // norm.num_groups < 16
            and x.numel() >= 2**19
        )

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps):
        batch, channels, height, width = x.shape
        y, mean, rstd = torch.native_group_norm(
            x, weight, bias, batch, channels, height * width, groups, eps
        )
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, mean, rstd = ctx.saved_tensors
        batch, channels, height, width = x.shape
        groups = mean.shape[1]
        grad = grad.contiguous(memory_format=torch.channels_last)
        ones = grad.new_ones(1).expand(batch * height, 1, width)

        def sums(values: Tensor) -> Tensor:
            """Add up (B, C, H, W) over H and W: (B, groups, C / groups) float32."""
            rows = values.permute(0, 2, 3, 1).reshape(batch * height, width, channels)
            return (ones @ rows).view(batch, height, groups, -1).float().sum(1)

        def factors(values: Tensor) -> Tensor:
            """Return values of groups or channels as (B, C, 1, 1), as grad's dtype."""
            values = values.expand(batch, groups, channels // groups)
            return values.reshape(batch, channels, 1, 1).to(grad.dtype)

        # With m = mean and r = rstd, y = weight (x - m) r + bias. The sums S run over a group.
        weight, mean, rstd = weight.view(groups, -1), mean[:, :, None], rstd[:, :, None]
        # Without m, which is rounded here, no large numbers cancel below. It keeps few of its bits:
        # with all, x - m would be rounded the same way for all x between two powers of 2, and these
        # errors would add up.
        power = (-rstd.log2()).floor().exp2()
        rounded = ((mean / power).round() * power).to(grad.dtype)
        mean = mean - rounded
        x = x - factors(rounded)
        of_grad, of_products = sums(grad), sums(grad * x)
        grad_weight = rstd * (of_products - mean * of_grad)
        # dx = weight r grad - slope (x - m) - r S(weight grad) / n
        n = height * width * channels // groups
        mean_grad = (weight * of_grad).sum(2, keepdim=True) / n
        slope = rstd**2 * (weight * grad_weight).sum(2, keepdim=True) / n
        shift = slope * mean - rstd * mean_grad
        grad_x = torch.addcmul(factors(shift), x, factors(-slope))
        grad_x.addcmul_(grad, factors(weight * rstd))
        return grad_x, grad_weight.sum(0).flatten(), of_grad.sum(0).flatten(), None, None
