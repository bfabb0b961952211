"""Norm, SiLU and convolution, and the residual block of two of them, as autograd functions that keep little.

Left to itself, autograd keeps for each of them the norm's input, its output and the activation until the backward pass.
Norm and activation are cheap beside the convolution, so here only the input is kept, and they are made again in
backward (Chen et al. 2016, arXiv:1604.06174, where it costs next to nothing). With the same kernels made again, the
gradients are the same, bit for bit. All are computed, whether wanted or not: in training they are.

A block's input may come in *parts* (N, C_i, H, W), to be concatenated: then the parts are kept, which others keep too,
and not another copy of them.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable

from models.norm_silu import EAGER, Kernels


class Settings(NamedTuple):
    """All but the tensors."""

    groups: int  # of the norms
    dropout: float = 0.0  # before a residual block's second convolution
    recompute: str = "norms"  # what backward makes again: "none", "norms" (and activations), "blocks" (all but inputs)
    kernels: Kernels = EAGER


class Layer(NamedTuple):
    """The parameters of norm, SiLU and convolution; the convolution's in the type that it is computed in."""

    norm_weight: Tensor  # (C_in,)
    norm_bias: Tensor  # (C_in,)
    weight: Tensor  # (C_out, C_in, k, k)
    bias: Tensor  # (C_out,)


class Kept(NamedTuple):
    """What a layer leaves for its backward pass beside its input; what backward makes again is None."""

    mean: Tensor
    rstd: Tensor
    mask: Tensor | None  # of dropout; False is dropped
    z: Tensor | None  # the norm's output
    a: Tensor | None  # what goes into the convolution


KEPT = len(Kept._fields)


def layer_forward(x: Tensor, layer: Layer, settings: Settings, dropout: float = 0.0) -> tuple[Tensor, Kept]:
    """x (N, C_in, H, W) -> (N, C_out, H, W)."""
    keep = settings.recompute == "none"
    a, z, mean, rstd = settings.kernels.forward(x, layer.norm_weight, layer.norm_bias, settings.groups, keep)
    mask = None
    if dropout:
        mask = torch.empty_like(a, dtype=torch.bool).bernoulli_(1 - dropout)
        a = drop(a, mask, dropout)
    y = F.conv2d(a, layer.weight, layer.bias, padding="same")
    return y, Kept(mean, rstd, mask, z, a if keep else None)


def layer_backward(
    grad_y: Tensor, x: Tensor, layer: Layer, kept: Kept, settings: Settings, dropout: float = 0.0
) -> tuple[Tensor, Layer]:
    """Gradients of the input and of the parameters."""
    norm, (mean, rstd, mask, z, a) = (layer.norm_weight, layer.norm_bias, settings.groups), kept
    if a is None:
        a, z = settings.kernels.again(x, mean, rstd, *norm)
        a = a if mask is None else drop(a, mask, dropout)
    grad_a, grad_weight, grad_bias = convolution_backward(grad_y, a, layer.weight)
    del a  # before more is made
    if mask is not None:
        grad_a = drop(grad_a, mask, dropout)
    grad_x, *grad_norm = settings.kernels.backward(grad_a, x, z, mean, rstd, *norm)
    return grad_x, Layer(*grad_norm, grad_weight, grad_bias)


class NormSiluConv(Function):
    """conv(silu(norm(x))): apply(settings, x (N, C_in, H, W), *layer) -> (N, C_out, H, W)."""

    @staticmethod
    def forward(ctx: FunctionCtx, settings: Settings, x: Tensor, *layer: Tensor) -> Tensor:
        y, kept = layer_forward(x, Layer(*layer), settings)
        ctx.settings = settings
        ctx.save_for_backward(x, *layer, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_y: Tensor) -> tuple:
        x, *rest = ctx.saved_tensors
        grad_x, grads = layer_backward(grad_y, x, Layer(*rest[:4]), Kept(*rest[4:]), ctx.settings)
        return None, grad_x, *grads


class Residual(Function):
    """layer_2(layer_1(x) + shift) + shortcut(x), where x is the concatenation of the parts.

    apply(settings, shift (N, C_out), *layer_1, *layer_2, shortcut's weight and bias, *parts) -> (N, C_out, H, W). With
    None, None for these two the shortcut is x itself.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, settings: Settings, shift: Tensor, *tensors: Tensor | None) -> Tensor:
        layer_1, layer_2, (weight, bias), parts = Layer(*tensors[:4]), Layer(*tensors[4:8]), tensors[8:10], tensors[10:]
        x = concatenated(parts)
        h, kept_1 = layer_forward(x, layer_1, settings)
        h += shift[:, :, None, None]
        y, kept_2 = layer_forward(h, layer_2, settings, settings.dropout)
        y += x if weight is None else F.conv2d(x, weight, bias)
        ctx.settings = settings
        ctx.save_for_backward(None if settings.recompute == "blocks" else h, shift, *kept_1, *kept_2, *tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_y: Tensor) -> tuple:
        h, shift, *rest = ctx.saved_tensors
        kept_1, kept_2, tensors = Kept(*rest[:KEPT]), Kept(*rest[KEPT : 2 * KEPT]), rest[2 * KEPT :]
        layer_1, layer_2, weight, parts = Layer(*tensors[:4]), Layer(*tensors[4:8]), tensors[8], tensors[10:]
        if h is None:
            h, kept_1 = layer_forward(concatenated(parts), layer_1, ctx.settings._replace(recompute="none"))
            h += shift[:, :, None, None]
        grad_h, grads_2 = layer_backward(grad_y, h, layer_2, kept_2, ctx.settings, ctx.settings.dropout)
        del h
        x = concatenated(parts)
        grad_x, grads_1 = layer_backward(grad_h, x, layer_1, kept_1, ctx.settings)
        grads_shortcut = (None, None)
        if weight is None:
            grad_x += grad_y
        else:
            grad_shortcut, *grads_shortcut = convolution_backward(grad_y, x, weight)
            grad_x += grad_shortcut
        grad_parts = split_like(grad_x, parts)
        return None, grad_h.sum((2, 3)), *grads_1, *grads_2, *grads_shortcut, *grad_parts


def convolution_backward(grad_y: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias of a convolution that keeps height and width."""
    padding = [weight.shape[2] // 2] * 2
    return torch.ops.aten.convolution_backward(
        grad_y, x, weight, [weight.shape[0]], [1, 1], padding, [1, 1], False, [0, 0], 1, [True, True, True]
    )


def drop(x: Tensor, mask: Tensor, dropout: float) -> Tensor:
    """Dropout with a given mask; the rest is enlarged, so that the expectation stays."""
    return x * mask * (1 / (1 - dropout))


def concatenated(parts: tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def split_like(x: Tensor, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The parts of a concatenation, each in one piece: slices would make every later operation on them slow."""
    if len(parts) == 1:
        return (x,)
    layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    return tuple(part.contiguous(memory_format=layout) for part in x.split([part.shape[1] for part in parts], dim=1))
