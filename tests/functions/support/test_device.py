"""What the hardware has, the GPU where there is one, and Adam in memory order: PyTorch's numbers without copies."""

import copy
import sys
from unittest.mock import MagicMock

import pytest
import torch

from functions.sampling.generation import generate
from functions.support.device import (
    Adam,
    arithmetic,
    choose_device,
    choose_precision,
    is_out_of_memory,
    keep_heap,
)
from functions.support.errors import UserError
from tests.conftest import image_sampler_of, small_unet

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("there", [["cuda", "mps", "cpu"], ["mps", "cpu"], ["cpu"]])
def test_auto_takes_the_fastest_device_there_is(there, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in there)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in there)
    assert choose_device().type == there[0]


def test_a_gpu_number_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert choose_device("cuda:1").index == 1
    assert [choose_device(name, index=1).index for name in ("auto", "cuda")] == [1, 1]
    assert chosen == [torch.device("cuda", 1)] * 3
    with pytest.raises(UserError, match="2 CUDA devices"):
        choose_device("cuda:2")
    with pytest.raises(UserError, match="'cuda:0', but each of several processes"):
        choose_device("cuda:0", index=1)  # of all of them


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_precision_on_cuda_asks_the_hardware_without_emulation(native, dtype, monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or native
    )
    assert choose_precision("auto", CUDA) == dtype


@pytest.mark.parametrize(
    ("cpuinfo", "native"),
    [
        ("processor : 0\nflags\t\t: fpu sse avx2 avx512f avx512_bf16\n", True),
        ("flags : fpu avx2 amx_bf16 amx_tile\n", True),
        ("processor : 0\nFeatures : fp asimd bf16 i8mm\n", True),
        ("flags : fpu sse avx2 avx512f\n", False),
        ("", False),
    ],
)
def test_auto_precision_on_a_cpu_asks_for_native_instructions(
    cpuinfo, native, monkeypatch, tmp_path
):
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    for name, dtype in {
        "cpuinfo": torch.bfloat16 if native else torch.float32,
        "missing": torch.float32,
    }.items():
        monkeypatch.setattr("functions.support.device.CPUINFO", tmp_path / name)
        assert choose_precision("auto", CPU) == dtype


def test_precision_by_name_and_as_the_run_was_started_with():
    torch.backends.cudnn.allow_tf32 = True  # PyTorch's default
    assert choose_precision("float32", CUDA) == torch.float32
    assert not torch.backends.cudnn.allow_tf32
    assert choose_precision("bfloat16", CPU) == torch.bfloat16
    assert choose_precision("auto", torch.device("mps")) == torch.float32
    for dtype in (torch.bfloat16, torch.float32):
        assert choose_precision("auto", CPU, arithmetic(CPU, dtype, 1, 8)["precision"]) == dtype
    # The first of a GPU, which the CPU is not trained in
    for unusable in ("float16", None, [], "int8"):
        assert choose_precision("bfloat16", CPU, unusable) == torch.bfloat16
    for unusable in ("float16", "int8"):
        with pytest.raises(
            UserError, match=f"'{unusable}'; on cpu it must be auto, float32, bfloat16"
        ):
            choose_precision(unusable, CPU)


def test_libraries_that_have_no_memory():
    fails = lambda text: is_out_of_memory(RuntimeError(text))
    assert fails("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    assert fails("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED")
    assert not fails("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_samples_on_the_gpu_are_those_of_the_cpu():
    model = small_unet()
    on_cpu = generate(image_sampler_of(model), range(3), 3)
    on_gpu = generate(image_sampler_of(copy.deepcopy(model).to(CUDA), device=CUDA), range(3), 3)
    assert (on_gpu.images - on_cpu.images).abs().max() < 0.05


@pytest.mark.skipif(sys.platform != "linux", reason="the GNU C library")
def test_a_kept_heap_has_its_pages_already():
    """A block of 64 MB, freed and allocated again: without the setting each of its pages faults anew."""
    resource = pytest.importorskip("resource")
    keep_heap()
    faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        before = faults()
        torch.empty(16_000_000).zero_()
    assert faults() - before < 1000  # of 15,600 pages


def test_adam_skips_a_step_on_mps_too():
    """Where the kernel does not look at the flag; one that says that it is there, and is true, stands in for it."""
    weight = torch.ones(3, requires_grad=True)
    weight.grad, optimizer = torch.ones(3), Adam([weight], lr=0.1, fused=True)
    optimizer.found_inf = MagicMock(device=torch.device("mps"))
    optimizer.step()
    assert torch.equal(weight, torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adam_in_memory_order_is_pytorchs(dtype):
    """Steps on weights in channels_last, some of them skipped, against the plain Adam on contiguous ones."""
    torch.manual_seed(0)
    start = [torch.randn(shape, dtype=dtype) for shape in ((8, 6, 3, 3), (8, 6, 1, 1), (8,))]
    found = {}
    for kind, layout in ((Adam, torch.channels_last), (torch.optim.Adam, torch.contiguous_format)):
        copies = [
            t.clone(memory_format=layout if t.dim() == 4 else torch.contiguous_format)
            for t in start
        ]
        parameters = [copy.requires_grad_() for copy in copies]
        optimizer = kind(parameters, lr=0.1, fused=True)
        for step in range(5):
            for parameter in parameters:
                parameter.grad = torch.sin(parameter.detach() * (step + 1))
            optimizer.found_inf = torch.tensor(float(step == 2))
            optimizer.step()
        moments = [optimizer.state[parameter]["exp_avg_sq"] for parameter in parameters]
        found[kind] = parameters + moments
    for ours, theirs in zip(*found.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_adam_copies_no_weights():
    """On weights in channels_last it copies no more than PyTorch's does on contiguous ones."""
    copied = {}
    ours, least = (Adam, torch.channels_last), (torch.optim.Adam, torch.contiguous_format)
    theirs = torch.optim.Adam, torch.channels_last
    for kind, layout in (ours, theirs, least):
        weight = torch.randn(8, 6, 3, 3).contiguous(memory_format=layout).requires_grad_()
        weight.grad = torch.ones_like(weight)
        optimizer = kind([weight], lr=0.1, fused=True)
        optimizer.step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            optimizer.step()
        copied[kind, layout] = sum(
            event.count for event in profile.key_averages() if event.key == "aten::copy_"
        )
    assert copied[ours] == copied[least]
    assert copied[theirs] > copied[least]  # when this fails, PyTorch has mended it, and ours can go
