"""What only a real GPU can show; skipped without one."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import train
from functions.optimizers import Muon
from functions.sampling.generation import generate, take_steps
from functions.support import processes
from functions.support.command_line import run_script
from functions.training.metrics import read_metrics
from tests.conftest import (
    TINY,
    call,
    changed,
    during,
    newest,
    only_in,
    pipeline_of,
    small_unet,
    terminate,
    train_tiny,
)
from tests.forked import Program
from tests.functions.support.test_processes import free_port
from tests.kill import assert_same_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
# 20 steps of 4 passes of two images.
CUDA = """
    --device cuda
    --diffusion.precision auto
    --diffusion.batch-size 2
    --diffusion.gradient-accumulation 4
    --diffusion.epochs 4
"""


@pytest.mark.parametrize("compiled", ["false", "true"])
def test_a_network_learns_in_20_steps(compiled, pictures, tmp_path):
    run = train_tiny(pictures, tmp_path, CUDA, "--diffusion.compile true", compiled)
    first, *_, last = read_metrics(run / "metrics.csv")
    assert last["step"] == 20
    assert last["loss"] < first["loss"]
    assert str(newest(run)["run"]["arithmetic"]["compiled"]).lower() == compiled


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_deterministic_run_resumes_bit_for_bit(precision, pictures, tmp_path):
    """A run that is stopped after step 7 and resumed is compared with one that never stopped."""
    flags = [CUDA, "--diffusion.deterministic true --diffusion.precision", precision]
    straight = train_tiny(pictures, tmp_path / "straight", *flags)
    with pytest.raises(SystemExit, match="75"), during(7, terminate):
        train_tiny(pictures, tmp_path / "cut", *flags)
    cut = only_in(tmp_path / "cut")
    call(train, "--resume", cut, "--device cuda")
    assert_same_run(straight, cut)


@pytest.fixture
def waiting_is_an_error():
    """Return a function after whose call the host may not wait for the GPU."""
    yield partial(torch.cuda.set_sync_debug_mode, "error")
    torch.cuda.set_sync_debug_mode("default")


def test_muon_waits_for_no_device(waiting_is_an_error):
    model = small_unet().cuda()
    optimizer = Muon(model, 1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    waiting_is_an_error()
    optimizer.step()


def test_the_host_never_waits_for_the_gpu(waiting_is_an_error):
    cuda = torch.device("cuda")
    pipeline = pipeline_of(small_unet().cuda(), device=cuda, sampler="dpm++", steps=5)
    noise = pipeline.noise(range(4))
    # The first call loads kernels, for which the host waits.
    denoiser = pipeline.models.denoiser
    take_steps(pipeline, denoiser, noise(), pipeline.times, noise)
    # In the second one tables are made before the end of the first step.
    take_steps(
        pipeline, denoiser, noise(), pipeline.times, noise, lambda *step: waiting_is_an_error()
    )


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_samples_are_those_of_the_cpu(precision):
    model = small_unet()
    expected = generate(pipeline_of(model, sampler="ddim", steps=10), range(8))
    cuda = torch.device("cuda")
    on_gpu = pipeline_of(model.cuda(), device=cuda, sampler="ddim", steps=10)
    denoiser = replace(on_gpu.models.denoiser, precision=precision)
    on_gpu = changed(on_gpu, {"denoiser": denoiser})
    assert (generate(on_gpu, range(8)) - expected).square().mean().sqrt() < 0.05


def test_out_of_memory_is_a_sentence(pictures, tmp_path, capsys):
    """The process may use a thousandth of the GPU."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.001)
    try:
        with pytest.raises(SystemExit, match="2"):
            run_script(partial(train_tiny, pictures, tmp_path, CUDA, "--model.base-dim 256"))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    error = capsys.readouterr().err
    assert "error: out of memory (" in error


def train_with_ddp():
    """Let a single process exchange its gradients with itself, by NCCL."""

    pytest.MonkeyPatch().setattr(processes, "wrap", DistributedDataParallel)
    train.main()


def test_one_process_of_nccl_gives_the_numbers_of_none(pictures, tmp_path):
    flags = ["faces --diffusion.deterministic true --diffusion.dataset-name", pictures]
    flags += [TINY, CUDA, "--runs"]
    group = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    nccl = tmp_path / "nccl"
    program = Program(tmp_path / "printed", *flags, nccl, act=train_with_ddp, **group)
    assert program.wait() == 0, program.printed
    alone = tmp_path / "alone"
    call(train, *flags, alone)
    models = [newest(only_in(runs))["model"] for runs in (nccl, alone)]
    torch.testing.assert_close(*models)
