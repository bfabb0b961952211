"""The hardware's devices and precisions, and Adam on MPS."""

from unittest.mock import Mock

import pytest
import torch

from functions.support import processes
from functions.support.command_line import is_out_of_memory
from functions.support.device import (
    choose_device,
    choose_precision,
    cpu_has_bfloat16,
)
from tests.conftest import CPU, refused

CUDA = torch.device("cuda")


def test_auto_takes_the_fastest_device_there_is(monkeypatch):
    for fastest in ("cuda", "mps", "cpu"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda name=fastest: name == "cuda")
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda name=fastest: name != "cpu")
        monkeypatch.setattr(torch, "empty", Mock())
        assert choose_device("auto").type == fastest


def test_each_process_has_a_gpu_that_is_there(monkeypatch):
    def empty(size, device):
        if device.index > 1:
            raise torch.AcceleratorError("CUDA error: invalid device ordinal")

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen := Mock())
    with refused("'cuda:2'; it must be"):
        choose_device("cuda:2")

    for name, index in (("cuda:1", None), ("auto", 1), ("cuda", 1), ("cuda:0", 1)):
        monkeypatch.setattr(processes, "gpu_index", Mock(return_value=index))
        assert choose_device(name).index == 1
        chosen.assert_called_with(torch.device("cuda", 1))


@pytest.mark.parametrize(
    "device, native, name, others, expected",
    [
        (CUDA, True, "auto", [], "bfloat16"),
        (CUDA, False, "auto", [], "float16"),
        (CPU, True, "auto", [], "bfloat16"),
        (CPU, False, "auto", [], "float32"),
        # A resumed run keeps its precision only where the device has it (test_resuming.py).
        (CUDA, False, "auto", ["bfloat16"], "float16"),
        # Samples have that of the training, or else float32, as for a model that does not say it.
        (CPU, True, "auto", ["bfloat16", "float32"], "bfloat16"),
        (CUDA, False, "auto", ["bfloat16", "float32"], "float32"),
        (CUDA, True, "auto", [None, "float32"], "float32"),
        # A precision that is named is taken.
        (CUDA, False, "bfloat16", ["float16", "float32"], "bfloat16"),
    ],
)
def test_auto_is_the_fastest_precision_that_fits(
    device, native, name, others, expected, monkeypatch
):
    """A GPU that has no bfloat16 emulates it."""

    def is_supported(including_emulation):
        return including_emulation or native

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    monkeypatch.setattr("functions.support.device.cpu_has_bfloat16", lambda: native)
    assert choose_precision(name, device, *others) == getattr(torch, expected)
    with refused("float16 needs a CUDA GPU"):
        choose_precision("float16", CPU)


def test_the_instructions_of_a_cpu_are_read(monkeypatch, tmp_path):
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr("functions.support.device.CPUINFO", path)
    # Other systems than Linux have no such file.
    assert not cpu_has_bfloat16()
    for cpuinfo, has in {
        "processor : 0\nflags\t\t: fpu sse avx2 avx512f avx512_bf16\n": True,
        "processor : 0\nFeatures : fp asimd bf16 i8mm\n": True,
        "flags : fpu sse avx2 avx512f\n": False,
    }.items():
        path.write_text(cpuinfo)
        assert cpu_has_bfloat16() == has


def test_a_cpu_and_libraries_that_have_no_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    for message, memory in {
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`": True,
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED": True,
        "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED": False,
        # oneDNN says this of shapes that it does not compute, too.
        "could not create a primitive descriptor for a convolution": False,
    }.items():
        assert is_out_of_memory(RuntimeError(message)) == memory


def test_a_process_group_of_ones_own_does_not_choose_the_device(tmp_path):
    """Only torchrun says which GPU a process has."""
    group = f"file://{tmp_path / 'group'}"
    torch.distributed.init_process_group("gloo", init_method=group, rank=0, world_size=1)
    assert choose_device("cpu") == CPU
    torch.distributed.destroy_process_group()
