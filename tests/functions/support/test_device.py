"""The hardware's devices and precisions, and Adam on MPS."""

import sys
from unittest.mock import MagicMock

import pytest
import torch

from config import EXPERIMENTS
from functions.optimizers import Adam
from functions.support.device import (
    arithmetic,
    choose_device,
    choose_precision,
    is_out_of_memory,
    precision_facts,
    sampling_precision,
)
from functions.support.errors import UserError
from tests.forked import Program

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("available", [["cuda", "mps", "cpu"], ["mps", "cpu"], ["cpu"]])
def test_auto_takes_the_fastest_device_there_is(available, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in available)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in available)

    assert choose_device().type == available[0]


def test_a_gpu_number_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)

    assert choose_device("cuda:1").index == 1
    assert choose_device("auto", index=1).index == 1
    assert choose_device("cuda", index=1).index == 1
    assert chosen == [torch.device("cuda", 1)] * 3

    with pytest.raises(UserError, match="2 CUDA devices"):
        choose_device("cuda:2")

    # All of several processes would share the GPU that is named.
    with pytest.raises(UserError, match="'cuda:0', but with several processes"):
        choose_device("cuda:0", index=1)


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_precision_on_cuda_asks_the_hardware_without_emulation(native, dtype, monkeypatch):
    def is_supported(including_emulation):
        return including_emulation or native

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert choose_precision("auto", CUDA) == dtype


def test_a_run_in_bfloat16_goes_on_where_that_is_only_emulated(monkeypatch):
    def is_supported(including_emulation):
        return including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert choose_precision("auto", CUDA, "bfloat16") == torch.float16

    # Where it was asked for by its name, the resumed run may be given another, such as "auto".
    with pytest.raises(UserError, match="'bfloat16'; on cuda it must be auto, float16, float32"):
        choose_precision("bfloat16", CUDA, "bfloat16")
    resumed = EXPERIMENTS["faces"].resumed({"precision": "float32"}, {})
    assert choose_precision(resumed.diffusion.precision, CUDA, "float16") == torch.float32


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
    dtype = torch.bfloat16 if native else torch.float32

    # Other systems than Linux have no such file.
    for name, expected in {"cpuinfo": dtype, "missing": torch.float32}.items():
        monkeypatch.setattr("functions.support.device.CPUINFO", tmp_path / name)
        assert choose_precision("auto", CPU) == expected


def test_precision_by_name_and_as_the_run_was_previous(monkeypatch):
    monkeypatch.setattr("functions.support.device.cpu_has_bfloat16", lambda: False)
    assert choose_precision("bfloat16", CPU) == torch.bfloat16
    assert choose_precision("auto", torch.device("mps")) == torch.float32

    # A resumed run keeps its precision, as its checkpoint says it.
    for dtype in (torch.bfloat16, torch.float32):
        previous = arithmetic(CPU, dtype, 1, 8)["precision"]
        assert choose_precision("auto", CPU, previous) == dtype

    # float16 may come from a GPU's checkpoint, but no CPU trains in it.
    for unusable in ("float16", None, [], "int8"):
        assert choose_precision("bfloat16", CPU, unusable) == torch.bfloat16
    for unusable in ("float16", "int8"):
        message = f"'{unusable}'; on cpu it must be auto, float32, bfloat16"
        with pytest.raises(UserError, match=message):
            choose_precision(unusable, CPU)


@pytest.mark.parametrize(
    ("device", "native", "trained", "expected"),
    [
        # Where the device has the instructions, samples have the precision of the training.
        (CPU, True, "bfloat16", torch.bfloat16),
        (CUDA, True, "bfloat16", torch.bfloat16),
        (CUDA, True, "float16", torch.float16),
        (CUDA, False, "float16", torch.float16),
        (CUDA, True, "float32", torch.float32),
        # Elsewhere, and for a model that does not say it, they have float32.
        (CPU, False, "bfloat16", torch.float32),
        (CPU, True, "float16", torch.float32),
        (CUDA, False, "bfloat16", torch.float32),
        (torch.device("mps"), False, "bfloat16", torch.float32),
        (CUDA, True, None, torch.float32),
        (CPU, True, [], torch.float32),
    ],
)
def test_samples_have_the_precision_of_the_training(device, native, trained, expected, monkeypatch):
    monkeypatch.setattr("functions.support.device.cpu_has_bfloat16", lambda: native)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert sampling_precision("auto", device, trained) == expected
    assert sampling_precision("float32", device, trained) == torch.float32


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_stays_as_it_is_set_and_is_said_where_it_is_on(allowed, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    assert choose_precision("float32", CUDA) == torch.float32
    assert torch.backends.cudnn.allow_tf32 == allowed

    tf32 = {"tf32": True} if allowed else {}
    assert precision_facts(CUDA, torch.float32) == {"precision": "float32", **tf32}
    assert precision_facts(CUDA, torch.bfloat16) == {"precision": "bfloat16"}
    assert precision_facts(CPU, torch.float32) == {"precision": "float32"}


def test_libraries_that_have_no_memory():
    def says(text):
        return is_out_of_memory(RuntimeError(text))

    assert says("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    assert says("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED")

    # Other errors of a kernel do not come from too little memory.
    assert not says("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED")


def count_faults():
    """Count the page faults of a block that is freed and allocated again."""
    resource = pytest.importorskip("resource")
    choose_device("cpu")
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(16_000_000).zero_()
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    # The block of 64 MB has 15,600 pages.
    assert faults < 1000


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the GNU C library")
def test_a_kept_heap_has_its_pages_already(tmp_path):
    """Without the setting, each page faults anew. Earlier work has left no gaps in the heap."""
    program = Program(tmp_path / "printed", act=count_faults)
    assert program.wait() == 0, program.printed


def test_adam_skips_a_step_on_mps_too():
    """The kernel there does not look at the flag, so our step does.

    An object that says that it is on that device, and is true, stands in for the flag.
    """
    weight = torch.ones(3, requires_grad=True)
    weight.grad = torch.ones(3)
    optimizer = Adam([weight], lr=0.1)
    optimizer.found_inf = MagicMock(device=torch.device("mps"))

    optimizer.step()
    assert torch.equal(weight, torch.ones(3))
