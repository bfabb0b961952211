"""benchmarks/compare.py's measurements, each against numbers counted by hand."""

from collections import Counter
from dataclasses import replace

import torch
from torch import nn

from benchmarks.compare_arms import TINY, all_arms, build, configure
from benchmarks.compare_measures import counted_flops, kept_bytes, noise_loss, slope
from benchmarks.compare_replay import TensorKind, recorded, replay
from tests.conftest import script

CPU = torch.device("cpu")
OURS = all_arms("float32", "cpu")[0]


class Squares(nn.Module):
    """x (B, 2, 4, 4) -> its convolution, squared: keeps x for the weight's gradient, and h for the square's."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)

    def forward(self, x, t):
        h = self.conv(x)
        return h * h


def test_kept_bytes_are_those_counted_by_hand():
    module = Squares()
    total = lambda images: kept_bytes(module, lambda: module(torch.randn(images, 2, 4, 4), None).sum())
    assert total(1) == 4 * (2 * 16 + 3 * 16)  # x and h, float32; h twice saved is one storage, weights do not count
    assert slope(total) == total(1)


def test_slope_leaves_out_what_does_not_depend_on_the_batch():
    assert slope(lambda images: 100 + 7 * images) == 7


def test_flops_are_those_counted_by_hand():
    conv, linear = nn.Conv2d(3, 5, 3, padding=1), nn.Linear(7, 11, bias=False)
    x, y = torch.randn(2, 3, 8, 8), torch.randn(4, 7)
    forward = 2 * 2 * 64 * 5 * 3 * 9
    assert counted_flops(lambda: conv(x)) == forward
    assert counted_flops(lambda: conv(x).sum().backward()) == 2 * forward  # x needs no gradient
    assert counted_flops(lambda: conv(x.clone().requires_grad_()).sum().backward()) == 3 * forward
    assert counted_flops(lambda: linear(y)) == 2 * 4 * 7 * 11


class Twice(torch.autograd.Function):
    """a @ b, with its own gradients."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a @ b

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        return grad @ b.T, a.T @ grad


def test_flops_inside_autograd_functions_are_counted():
    a, b = torch.randn(2, 3, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    assert counted_flops(lambda: Twice.apply(a, b).sum().backward()) == 3 * 2 * 2 * 3 * 5


def test_attention_on_the_cpu_is_counted():
    q = torch.randn(1, 1, 64, 16)
    assert counted_flops(lambda: nn.functional.scaled_dot_product_attention(q, q, q)) == 2 * 2 * 64 * 64 * 16


def test_the_replay_has_every_convolution_and_matrix_product_once_forward_and_backward():
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 4, 3, padding=1), nn.SiLU(),
        nn.Conv2d(4, 4, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(64, 5),
    ).to(memory_format=torch.channels_last)  # fmt: skip
    x = torch.randn(3, 2, 4, 4).contiguous(memory_format=torch.channels_last)
    calls = recorded(lambda: net(x).sum().backward())
    by_name = Counter()
    for call, count in calls.items():
        by_name[call.operator._overloadpacket.__name__] += count
    assert by_name == {"convolution": 3, "convolution_backward": 3, "addmm": 1, "mm": 2}
    # The last two convolutions are the same forward; backward the last one's gradient comes in the other layout
    assert sorted(calls.values()) == [1, 1, 1, 1, 1, 1, 1, 2]
    flops = counted_flops(lambda: net(x).sum().backward())
    alone = sum(count * counted_flops(call.ready(CPU)) for call, count in calls.items())
    assert alone == flops
    assert 0 < replay(calls, CPU) < 1


def test_replayed_tensors_are_of_the_same_kind():
    for tensor in (
        torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        torch.randn(3, 4).bfloat16().T,
        torch.zeros(()).expand(3, 4),
        torch.arange(6),
    ):
        kind = TensorKind.of(tensor)
        assert TensorKind.of(kind.random(CPU)) == kind


def test_networks_are_the_same_size_and_none_starts_at_zero():
    x_t, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 900])
    for package in ("ours", "diffusers", "lucidrains"):
        for recompute in ("none", "blocks") if package != "lucidrains" else ("none",):
            arm = replace(OURS, package=package, recompute=recompute)
            module = build(arm, TINY, CPU)
            loss = noise_loss(configure(arm, module), x_t, t, torch.zeros_like(x_t), torch.float32)
            loss.backward()
            assert loss > 0
            silent = [name for name, p in module.named_parameters() if not p.grad.any() and "key.bias" not in name]
            assert not [name for name in silent if "to_k.bias" not in name]


def test_a_missing_peer_is_named_before_anything_is_measured():
    code = """
import importlib.metadata, runpy, sys
version = importlib.metadata.version
def without(package):
    if package == "diffusers":
        raise importlib.metadata.PackageNotFoundError(package)
    return version(package)
importlib.metadata.version = without
sys.argv = ["compare.py", "--quick"]
runpy.run_path("benchmarks/compare.py", run_name="__main__")
"""
    done = script("-c", code)
    assert done.returncode == 2
    assert "diffusers is not installed: pip install -r requirements-dev.txt" in done.stderr
    assert "starting" not in done.stderr
