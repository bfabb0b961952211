"""What the hardware has, and the GPU paths where there is a GPU."""

import copy
import sys

import pytest
import torch

import sample
import train
from functions.losses import noise_prediction_loss
from functions.noise_scheduler import NoiseScheduler
from functions.sampling.generation import generate
from functions.support import device as device_module
from functions.support.device import (
    arithmetic,
    choose_device,
    choose_precision,
    fast_layout,
    keep_heap,
)
from functions.support.errors import UserError
from functions.support.random_numbers import training_draws
from tests.conftest import TINY, call, image_sampler_of, small_unet

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("there", [["cuda", "mps", "cpu"], ["mps", "cpu"], ["cpu"]])
def test_auto_takes_the_fastest_device_there_is(there, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in there)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in there)
    assert choose_device().type == there[0]


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "xpu"])
def test_unknown_devices_are_refused(name):
    with pytest.raises(UserError, match=f"device is '{name}'"):
        choose_device(name)


def test_a_gpu_number_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert choose_device("cuda:1").index == 1
    assert [choose_device(name, index=1).index for name in ("auto", "cuda", "cuda:0")] == [1, 1, 0]
    assert chosen == [torch.device("cuda", index) for index in (1, 1, 1, 0)]
    with pytest.raises(UserError, match="2 CUDA devices"):
        choose_device("cuda:2")


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_precision_on_cuda_asks_the_hardware_without_emulation(native, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or native)
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
def test_auto_precision_on_a_cpu_asks_for_native_instructions(cpuinfo, native, monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(device_module, "CPUINFO", tmp_path / "cpuinfo")
    assert choose_precision("auto", CPU) == (torch.bfloat16 if native else torch.float32)
    monkeypatch.setattr(device_module, "CPUINFO", tmp_path / "missing")
    assert choose_precision("auto", CPU) == torch.float32


def test_precision_by_name():
    assert choose_precision("float32", CUDA) == torch.float32
    assert choose_precision("bfloat16", CPU) == torch.bfloat16
    assert choose_precision("auto", torch.device("mps")) == torch.float32
    with pytest.raises(UserError, match="'float16'; on cpu it must be auto, float32, bfloat16"):
        choose_precision("float16", CPU)
    with pytest.raises(UserError, match="'int8'"):
        choose_precision("int8", CPU)


def test_bfloat16_is_close_to_float32_on_the_cpu():
    model, scheduler = small_unet(), NoiseScheduler(1000)
    draws = training_draws(0, 0, 8, (3, 16, 16), 1000, CPU)
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast(CPU.type, dtype, enabled=dtype != torch.float32):
            losses[dtype] = noise_prediction_loss(model, scheduler, torch.zeros(8, 3, 16, 16), draws.t, draws.noise)
    torch.testing.assert_close(losses[torch.bfloat16], losses[torch.float32], rtol=0.02, atol=0)
    assert not torch.equal(losses[torch.bfloat16], losses[torch.float32])  # autocast did something


@needs_cuda
def test_network_and_schedule_agree_with_the_cpu():
    model, scheduler = small_unet(), NoiseScheduler(1000)
    draws = training_draws(0, 0, 8, (3, 16, 16), 1000, CPU)
    x_0 = torch.rand(8, 3, 16, 16) * 2 - 1
    on_cpu = noise_prediction_loss(model, scheduler, x_0, draws.t, draws.noise)
    model.to(CUDA, memory_format=fast_layout(CUDA))
    on_gpu = noise_prediction_loss(model, scheduler, x_0.cuda(), draws.t.cuda(), draws.noise.cuda())
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-3, atol=1e-4)


def test_a_resumed_run_keeps_the_precision_that_it_was_started_with():
    for dtype in (torch.bfloat16, torch.float32):
        assert choose_precision("auto", CPU, arithmetic(CPU, dtype, 1, 8)["precision"]) == dtype
    for unusable in ("float16", None, [], "int8"):  # the first of a GPU, which the CPU is not trained in
        assert choose_precision("bfloat16", CPU, unusable) == torch.bfloat16


@needs_cuda
def test_samples_on_the_gpu_are_those_of_the_cpu():
    model = small_unet()
    on_cpu = generate(image_sampler_of(model), range(3), 3)
    on_gpu = generate(image_sampler_of(copy.deepcopy(model).to(CUDA), device=CUDA), range(3), 3)
    assert (on_gpu.images - on_cpu.images).abs().max() < 0.05


@needs_cuda
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_training_and_sampling_on_the_gpu(precision, pictures, tmp_path):
    call(train.main, "faces", "--runs", tmp_path, "--diffusion.dataset-name", pictures, *TINY, "--device", "cuda",
         "--diffusion.precision", precision)  # fmt: skip
    call(sample.main, "--runs", tmp_path, "--n", 2, "--steps", 3, "--device", "cuda")


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
