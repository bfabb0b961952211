"""The own autograd functions against finite differences and against PyTorch's autograd; and what they keep, by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.testing import assert_close

import models.norm_silu as norm_silu
from functions.optimizer import Adam
from models.blocks import Upsample, doubled_kernel, norm_silu_conv
from models.norm_silu import EAGER, NORM_EPS, PLAIN
from models.residual import NormSiluConv, Residual, Settings
from tests.plain_unet import plain_upsample

GROUPS, N, H = 2, 2, 4
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(autouse=True)
def every_path(monkeypatch):
    """Also at the few pixels of these tests the own backward pass for channels_last."""
    monkeypatch.setattr(norm_silu, "FEW_PIXELS", 0)


def random(*shape, layout=torch.contiguous_format, seed=0):
    values = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape) + seed))
    return (values.contiguous(memory_format=layout) if len(shape) == 4 else values).requires_grad_()


def layer(channels, out, size, layout):
    """Norm and convolution; the norm's weight is away from 0 and 1."""
    return [random(channels, seed=1), random(channels, seed=2),
            random(out, channels, size, size, layout=layout), random(out, seed=3)]  # fmt: skip


@pytest.mark.parametrize("kernels", [EAGER, PLAIN], ids=["eager", "plain"])
@pytest.mark.parametrize("recompute", ["none", "norms", "blocks"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("parts", [(4,), (6,), (4, 2)], ids=["identity", "shortcut", "two parts"])
def test_the_residual_block_has_the_gradients_of_finite_differences(parts, layout, recompute, kernels):
    channels = sum(parts)
    shortcut = [None, None]
    if channels != 4:
        shortcut = [random(4, channels, 1, 1, layout=layout), random(4, seed=9)]
    settings = Settings(GROUPS, recompute=recompute, kernels=kernels)
    tensors = [random(N, 4, seed=5), *layer(channels, 4, 3, layout), *layer(4, 4, 3, layout), *shortcut,
               *(random(N, part, H, H, layout=layout) for part in parts)]  # fmt: skip
    assert gradcheck(lambda *args: Residual.apply(settings, *args), tensors)


@pytest.mark.parametrize("recompute", ["none", "norms", "blocks"])
def test_dropout_is_the_same_again_in_backward(recompute):
    settings = Settings(GROUPS, dropout=0.4, recompute=recompute)
    tensors = [random(N, 4, seed=5), *layer(4, 4, 3, LAYOUTS[1]), *layer(4, 4, 3, LAYOUTS[1]), None, None,
               random(N, 4, H, H, layout=LAYOUTS[1])]  # fmt: skip

    def block(*args):
        torch.manual_seed(7)
        return Residual.apply(settings, *args)

    assert gradcheck(block, tensors)
    assert (block(*tensors) - Residual.apply(settings._replace(dropout=0.0), *tensors)).abs().max() > 0.1


@pytest.mark.parametrize("kernels", [EAGER, PLAIN], ids=["eager", "plain"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_norm_silu_conv_has_the_gradients_of_finite_differences(layout, kernels):
    settings = Settings(GROUPS, kernels=kernels)
    tensors = [random(N, 4, H, H, layout=layout), *layer(4, 3, 3, layout)]
    assert gradcheck(lambda *args: NormSiluConv.apply(settings, *args), tensors)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mean", [0, 4, 16], ids=lambda mean: f"mean {mean} std")
@pytest.mark.parametrize("channels, groups, size", [(64, 32, 20), (96, 12, 17), (512, 32, 8)])
def test_half_precision_is_as_good_as_pytorchs_own(channels, groups, size, mean, layout):
    """Output and gradients in bfloat16, against float64: their errors are near those of group_norm, silu, conv2d.

    PyTorch's has the norm's gradients in float32; ours are rounded like those of all convolutions.
    """
    torch.manual_seed(0)
    norm, conv = torch.nn.GroupNorm(groups, channels, NORM_EPS), torch.nn.Conv2d(channels, 8, 3, padding=1)
    torch.nn.init.normal_(norm.weight)
    x = (mean + torch.randn(3, channels, size, size)).bfloat16().contiguous(memory_format=layout)
    ways = {
        "ours": lambda x: norm_silu_conv(norm, conv, x, Settings(groups)),
        "PyTorch's": lambda x: conv(F.silu(norm(x))),
    }

    def run(way, x):
        x = x.detach().requires_grad_()
        y = ways[way](x)
        seen = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        return [y, *torch.autograd.grad(y, [x, *norm.parameters(), *conv.parameters()], seen)]

    halves = {}
    for way in ways:
        with torch.autocast("cpu", torch.bfloat16):
            halves[way] = run(way, x)
    norm.double(), conv.double()
    exact = run("PyTorch's", x.double())
    for ours, theirs, truth in zip(*halves.values(), exact, strict=True):
        error = lambda value, truth=truth: ((value.double() - truth).norm() / truth.norm()).item()
        assert error(ours) < max(1.5 * error(theirs), 0.006)
        assert ours.dtype == theirs.dtype


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernels_of_other_devices_get_what_they_take(monkeypatch, layout, dtype):
    """The path of CUDA, taken on the CPU: all float32 and contiguous for PyTorch, x's type and layout for the rest."""
    monkeypatch.setattr(norm_silu, "has_cpu_kernels", lambda x: False)
    native, seen = torch.ops.aten.native_group_norm, []
    monkeypatch.setattr(torch.ops.aten, "native_group_norm", lambda *args: seen.append(args[:3]) or native(*args))
    x, grad_a = (random(N, 8, H, H, layout=layout, seed=s).detach().to(dtype) for s in (1, 2))
    weight, bias = (random(8, seed=s).detach().float() for s in (3, 4))
    found = []
    for kernels in (EAGER, PLAIN):
        a, z, mean, rstd = kernels.forward(x, weight, bias, GROUPS, False)
        assert (a.dtype, a.stride(), z) == (dtype, x.stride(), None)
        again, z = kernels.again(x, mean, rstd, weight, bias, GROUPS)
        grads = kernels.backward(grad_a.clone(), x, z, mean, rstd, weight, bias, GROUPS)
        found.append([a, again, mean, rstd, *grads])
    for ours, plain in zip(*found, strict=True):
        assert (ours.dtype, ours.stride()) == (plain.dtype, plain.stride())
        assert_close(ours, plain, rtol=2e-2, atol=2e-2)
    assert seen
    assert all(tensor.dtype == torch.float32 and tensor.is_contiguous() for args in seen for tensor in args)


def test_what_the_block_keeps_is_counted_by_hand():
    """Two parts, the state between the convolutions, four numbers a group and image; and with "blocks" no state."""
    kept = {}
    for recompute in ("none", "norms", "blocks"):
        settings, storages = Settings(GROUPS, recompute=recompute), {}
        parameters = [*layer(6, 4, 3, LAYOUTS[1]), *layer(4, 4, 3, LAYOUTS[1]), random(4, 6, 1, 1), random(4)]
        parts = [random(N, part, H, H, layout=LAYOUTS[1]) for part in (4, 2)]
        shift = random(N, 4)
        own = {tensor.data_ptr() for tensor in parameters}

        def see(tensor, storages=storages, own=own):
            if tensor.data_ptr() not in own:
                storages[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
            y = Residual.apply(settings, shift, *parameters, *parts)
        kept[recompute] = sum(storages.values())
        del y
    double, image = 8, N * H * H * 8
    small = double * (N * 4 + 4 * N * GROUPS)  # shift; mean and rstd of both norms
    assert kept["blocks"] == 6 * image + small
    assert kept["norms"] == (6 + 4) * image + small
    assert kept["none"] == (6 + 4 + 2 * 6 + 2 * 4) * image + small  # and z and a of both layers


@pytest.mark.parametrize("size", [5, 16])  # below and above WORTH_DOUBLING
def test_upsampling_is_nearest_neighbour_and_convolution(size):
    upsample = Upsample(4).double()
    x = random(N, 4, size, size)
    results = []
    for way in (upsample, lambda x: plain_upsample(upsample, x)):
        y = way(x)
        seen = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
        results.append([y, *torch.autograd.grad(y, [x, *upsample.parameters()], seen)])
    assert results[0][0].shape == (N, 4, 2 * size, 2 * size)
    for ours, plain in zip(*results, strict=True):
        assert_close(ours, plain)


def test_the_doubled_kernel_of_one_weight_is_a_square_of_four():
    """Weight (0, 2) alone: output o sees the doubled pixel o + (0, 2) - 1, so each pixel fills 4 outputs."""
    weight = torch.zeros(1, 1, 3, 3)
    weight[0, 0, 0, 2] = 1
    expected = torch.zeros(4, 4)
    expected[2:4, 0:2] = 1  # rows 2i + 1 and 2i + 2, columns 2j - 1 and 2j, where the kernel begins at 2i - 1, 2j - 1
    assert_close(doubled_kernel(weight)[0, 0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adam_in_memory_order_is_pytorchs(dtype):
    """Steps on weights in channels_last, some of them skipped, against the plain Adam on contiguous ones."""
    torch.manual_seed(0)
    start = [torch.randn(8, 6, 3, 3, dtype=dtype), torch.randn(8, 6, 1, 1, dtype=dtype), torch.randn(8, dtype=dtype)]
    found = {}
    for kind, layout in ((Adam, torch.channels_last), (torch.optim.Adam, torch.contiguous_format)):
        parameters = [t.clone().contiguous(memory_format=layout if t.dim() == 4 else torch.contiguous_format)
                      .requires_grad_() for t in start]  # fmt: skip
        optimizer = kind(parameters, lr=0.1, fused=True)
        for step in range(5):
            for parameter in parameters:
                parameter.grad = torch.sin(parameter.detach() * (step + 1))
            optimizer.found_inf = torch.tensor(float(step == 2))
            optimizer.step()
        moments = [optimizer.state[parameter]["exp_avg_sq"] for parameter in parameters]
        assert all(moment.shape == parameter.shape for moment, parameter in zip(moments, parameters, strict=True))
        found[kind] = parameters + moments
    for ours, theirs in zip(*found.values(), strict=True):
        assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_adam_copies_no_weights():
    """On weights in channels_last it copies no more than PyTorch's does on contiguous ones."""
    copied = {}
    for kind, layout in ((Adam, LAYOUTS[1]), (torch.optim.Adam, LAYOUTS[1]), (torch.optim.Adam, LAYOUTS[0])):
        weight = torch.randn(8, 6, 3, 3).contiguous(memory_format=layout).requires_grad_()
        weight.grad = torch.ones_like(weight)
        optimizer = kind([weight], lr=0.1, fused=True)
        optimizer.step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            optimizer.step()
        copied[kind, layout] = sum(event.count for event in profile.key_averages() if event.key == "aten::copy_")
    least = copied[torch.optim.Adam, LAYOUTS[0]]
    assert copied[Adam, LAYOUTS[1]] == least
    assert copied[torch.optim.Adam, LAYOUTS[1]] > least  # when this fails, PyTorch has mended it, and ours can go
