"""CUDA without a GPU: the real code runs on a pretended device (tests/pretended_cuda.py).

It runs in a process of its own: `python -m tests.test_pretended_cuda [NAME ...]` prints what each
of SCENARIOS finds, a line of JSON for each.
"""

import contextlib
import io
import json
import os
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import train
from config import EXPERIMENTS
from data.datasets import ImageSet
from functions.evaluation.bits_per_dim import BoundOptions, measure_bits_per_dim
from functions.noise_scheduler import NoiseScheduler
from functions.prediction import Denoiser
from functions.samplers import SAMPLERS
from functions.sampling import generation
from functions.sampling.generation import ImageSampler, generate
from functions.sampling.options import SamplerOptions
from functions.support.device import choose_device
from functions.support.processes import SINGLE_PROCESS, Processes
from functions.support.run_folder import Run
from functions.training import recorder
from functions.training.recorder import Recorder
from models.unet import UNet
from tests.conftest import SMALL_MODEL, script
from tests.pretended_cuda import let_autograd_know_cuda, pretended_cuda

pytestmark = pytest.mark.slow
# One level has all kinds of layers but those between levels.
ONE_LEVEL = SMALL_MODEL | {"image_size": 8, "dim_multiply": (1,), "transformer_layers": ()}
# The process ends with this status when a private part of PyTorch is missing.
MISSING = 77


def training(
    name: str, model: dict | None = None, processes=SINGLE_PROCESS, steps: int = 2, **changes
) -> dict:
    """Train for some steps, and return what was seen.

    "steps" has a pair for each step: the lines that wait in it, and those in its book-keeping.
    "held" has for each forward pass how many storages hold gradients before it.
    """
    changes = {
        "gradient_accumulation": 2,
        "epochs": 1,
        "log_every": 2,
        "validate_every": 9,
        "sample_every": 9,
        "validation_samples": 20,
        "grid_images": 2,
        "grid_steps": 2,
        "compile": "auto" if model else "off",
        **changes,
    }
    experiment = EXPERIMENTS[name].override(changes, model or {})

    # A tenth of the images is for validation; the others suffice for the steps.
    size = experiment.model.image_size
    count = steps * experiment.diffusion.effective_batch
    count += count // 9
    images = np.zeros((count, size, size, 3), np.uint8)
    image_set = ImageSet(name, images, list(range(count)), "none", Path())

    waits = []
    held = []
    opened = Recorder.opened
    after_step = Recorder.after_step
    gradient_sync = Processes.gradient_sync
    with tempfile.TemporaryDirectory() as runs, pretended_cuda() as cuda:

        @contextlib.contextmanager
        def entered(instance):
            with opened(instance):
                # Before the first step there were trials for memory, which do not count.
                held.clear()
                cuda.waits.clear()
                yield

        def counted(instance, done, grad_norm):
            in_step = dict(cuda.waits)
            cuda.waits.clear()
            after_step(instance, done, grad_norm)
            waits.append((in_step, dict(cuda.waits)))
            cuda.waits.clear()

        def looked_at(processes, network, last):
            storages = set()
            for parameter in network.parameters():
                if parameter.grad is not None:
                    storages.add(parameter.grad.untyped_storage()._cdata)
            held.append(len(storages))
            return gradient_sync(processes, network, last)

        with (
            mock.patch.multiple(Recorder, opened=entered, after_step=counted),
            mock.patch.object(Processes, "gradient_sync", looked_at),
            mock.patch("train.load_images", lambda *_: image_set),
            # A CUDA graph that cannot be recorded must end no training, so its grids record none.
            mock.patch.object(generation, "CudaGraphed", mock.Mock(side_effect=AssertionError)),
        ):
            local_rank = processes.local_rank if processes.count > 1 else None
            device = choose_device("cuda", local_rank)
            train.train(Run(name, experiment, Path(runs)), device, processes)
    return {"steps": waits, "held": held}


def on_two_gpus() -> dict:
    """Train as the first of two processes, whose messages go nowhere."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    wrap = Processes.wrap

    def wrapped(self, model, device):
        network = wrap(self, model, device)
        network.register_comm_hook(None, passed_on)
        # The real logger would time the GPU.
        network.logger = mock.Mock()
        return network

    def passed_on(state, bucket) -> torch.futures.Future[torch.Tensor]:
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    with (
        mock.patch.object(Processes, "wrap", wrapped),
        mock.patch.object(Processes, "gather", lambda self, value: [value] * self.count),
        mock.patch("torch.nn.parallel.distributed._verify_param_shape_across_processes"),
    ):
        processes = Processes(0, 2, 0, os.getppid())
        return training("faces", ONE_LEVEL, processes, steps=3, gradient_accumulation=4)


def ffhq_full() -> dict:
    """Train the network that alone has its real size. Its checkpoint of 4 GB is not written."""
    with mock.patch.object(recorder, "save_checkpoint"):
        return training("ffhq-full")


def sampling() -> dict:
    """Return the lines that wait in 4 steps of each sampler, and run bits/dim, too."""
    found = {}
    with pretended_cuda() as cuda:
        device = choose_device("cuda")
        network = UNet(**SMALL_MODEL, channels=3).to(device, memory_format=torch.channels_last)
        denoiser = Denoiser(network, NoiseScheduler(50), torch.bfloat16)
        for name in SAMPLERS:
            sampler = ImageSampler(denoiser, SamplerOptions(name, 4), (3, 16, 16), 0, device)
            # The scheduler copies its table to the device once, before waits are counted.
            sampler.scheduler.alpha_bar(torch.zeros(1, dtype=torch.int64, device=device))
            cuda.waits.clear()
            generate(sampler, range(3))
            found[name] = dict(cuda.waits)

        def load_x_0(indices):
            return torch.zeros(len(indices), 3, 16, 16).to(device)

        # It must not raise; its waits are not counted.
        options = BoundOptions(t_stride=50, batch_size=8)
        measure_bits_per_dim(denoiser, load_x_0, np.arange(2), options)
    return found


SCENARIOS = {
    # Each step has a pass between its first and its last.
    "faces": lambda: training("faces", SMALL_MODEL, steps=3, gradient_accumulation=3),
    "faces-v": lambda: training("faces-v", ONE_LEVEL, precision="float16"),
    "ffhq-full": ffhq_full,
    "two GPUs": on_two_gpus,
    "sampling": sampling,
}


def main() -> None:
    """Print what the scenarios of the command line find, or all of them."""
    try:
        let_autograd_know_cuda()
        with pretended_cuda():
            pass
    except (AttributeError, ValueError, OSError, ImportError) as error:
        print(f"{type(error).__name__}: {error}")
        sys.exit(MISSING)
    torch.set_num_threads(1)
    for name in sys.argv[1:] or SCENARIOS:
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                found = SCENARIOS[name]()
            except Exception:
                found = {"error": traceback.format_exc()}
        line = {"scenario": name, "seconds": time.perf_counter() - start, **found}
        print(json.dumps(line), flush=True)
    # An ordinary end would let C++ call functions of ctypes that are gone by then.
    os._exit(0)


@pytest.fixture(scope="module")
def found() -> dict[str, dict]:
    """Return what each scenario found, from two processes of their own that run side by side."""
    # Both take about half a minute.
    halves = (["faces", "two GPUs", "sampling"], ["faces-v", "ffhq-full"])
    with ThreadPoolExecutor() as threads:
        results = list(threads.map(lambda half: script("-m", __name__, *half), halves))

    lines = []
    for result in results:
        if result.returncode == MISSING:
            pytest.skip(f"PyTorch {torch.__version__} lacks a private part: {result.stdout}")
        assert result.returncode == 0, result.stderr
        lines += [json.loads(line) for line in result.stdout.splitlines()]
    return {line["scenario"]: line for line in lines}


@pytest.mark.parametrize("name", ["faces", "faces-v", "ffhq-full", "two GPUs"])
def test_a_training_waits_only_where_it_logs(found, name):
    assert "error" not in found[name], found[name]["error"]
    in_steps, between = zip(*found[name]["steps"], strict=True)
    for waits in in_steps:
        # DDP sends itself once, after the first step, the order in which gradients came.
        if name == "two GPUs":
            assert all("prediction.py" in line for line in waits)
        else:
            assert not waits
    assert in_steps[-1] == between[0] == {}

    # Only trainings of three steps log before the end, after the second.
    *_, log, last = between
    assert sum(log.values()) == (1 if len(between) == 3 else 0)

    # At the end the last row and the checkpoint are written as well, by these files.
    saving = ("support/files.py", "support/checkpoint.py", "metrics.py", "bad_numbers.py")
    others = [count for line, count in last.items() if not any(file in line for file in saving)]
    assert sum(others) <= 4


def test_gradients_are_held_once(found):
    """There are none before the first pass of a step; DDP has one bucket for so small a network."""
    passes = found["faces"]["held"]
    assert passes[::3] == [0, 0, 0]
    assert passes[1] > 1
    assert set(found["two GPUs"]["held"]) == {1}


def test_sampling_waits_for_its_images_alone(found):
    assert "error" not in found["sampling"], found["sampling"]["error"]
    for name in SAMPLERS:
        ((line, count),) = found["sampling"][name].items()
        assert count == 1
        assert "copies to the CPU" in line


if __name__ == "__main__":
    main()
