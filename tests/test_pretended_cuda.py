"""CUDA without a GPU: the real code runs on a pretended device (tests/pretended_cuda.py), in a process of its own.

`python -m tests.test_pretended_cuda [NAME ...]` prints what each of SCENARIOS finds, a line of JSON for each.
"""

import contextlib
import io
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import train
from config import EXPERIMENTS
from data.datasets import ImageSet
from functions.ema import update_ema
from functions.evaluation.bits_per_dim import BoundOptions, measure_bits_per_dim
from functions.noise_scheduler import NoiseScheduler
from functions.prediction import Denoiser
from functions.sampling.generation import ImageSampler, generate
from functions.sampling.options import SAMPLERS, SamplerOptions
from functions.support.device import Adam, choose_device
from functions.support.processes import SINGLE_PROCESS, Processes
from functions.support.random_numbers import training_draws
from functions.support.run_folder import Run
from functions.training import book_keeping
from functions.training.book_keeping import BookKeeper
from models.group_norm import GroupNorm
from models.unet import UNet
from tests.conftest import SMALL_MODEL, script
from tests.pretended_cuda import let_autograd_know_cuda, pretended_cuda

pytestmark = pytest.mark.slow
MISSING = 77  # exit status: a private part of PyTorch is not there


def training(
    name: str, model: dict | None = None, processes=SINGLE_PROCESS, steps: int = 2, **changes
) -> dict:
    """The lines that wait in each step and in its book-keeping; and how many storages hold gradients before a pass."""
    changes |= {
        "gradient_accumulation": 4,
        "epochs": 1,
        "log_every": 2,
        "validate_every": 9,
        "sample_every": 9,
    }
    changes |= {
        "validation_samples": 20,
        "grid_images": 2,
        "grid_steps": 2,
        "compile": "auto" if model else "off",
    }
    experiment = EXPERIMENTS[name].override(changes, model or {})
    size, count = experiment.model.image_size, steps * experiment.diffusion.effective_batch
    images = np.zeros((count + count // 9, size, size, 3), np.uint8)
    image_set = ImageSet(name, images, list(range(len(images))), "none", Path())
    waits, held = [], []
    enter, after_step, accumulating = (
        BookKeeper.__enter__,
        BookKeeper.after_step,
        Processes.accumulating,
    )
    with tempfile.TemporaryDirectory() as runs, pretended_cuda() as cuda:

        def entered(books):
            books = enter(books)
            held.clear()  # of trials
            cuda.waits.clear()
            return books

        def counted(books, done, grad_norm):
            in_step = dict(cuda.waits)
            cuda.waits.clear()
            after_step(books, done, grad_norm)
            waits.append((in_step, dict(cuda.waits)))
            cuda.waits.clear()

        def looked_at(processes, network, last):
            grads = [
                parameter.grad for parameter in network.parameters() if parameter.grad is not None
            ]
            held.append(len({grad.untyped_storage()._cdata for grad in grads}))
            return accumulating(processes, network, last)

        with (
            mock.patch.multiple(BookKeeper, __enter__=entered, after_step=counted),
            mock.patch.object(Processes, "accumulating", looked_at),
            mock.patch("train.load_images", lambda *_: image_set),
        ):
            device = choose_device("cuda", processes.local_rank if processes.count > 1 else None)
            train.train(Run(name, experiment, Path(runs)), device, processes)
    return {"steps": waits, "held": held}


def on_two_gpus() -> dict:
    """As the first of two processes, whose messages go nowhere."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    wrap = Processes.wrap

    def wrapped(self, model, device):
        network = wrap(self, model, device)
        network.register_comm_hook(None, passed_on)
        network.logger = mock.Mock()  # it would time the GPU
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
        return training("faces", SMALL_MODEL, Processes(0, 2, 0, os.getppid()), steps=3)


def sampling() -> dict:
    """The lines that wait in 4 steps of each sampler; bits/dim is run too."""
    found = {}
    with pretended_cuda() as cuda:
        device = choose_device("cuda")
        network = UNet(**SMALL_MODEL, channels=3).to(device, memory_format=torch.channels_last)
        denoiser = Denoiser(network, NoiseScheduler(50), torch.bfloat16)
        for name in SAMPLERS:
            sampler = ImageSampler(denoiser, SamplerOptions(name, 4), (3, 16, 16), 0, device)
            # Copies its table, once
            sampler.scheduler.alpha_bar(torch.zeros(1, dtype=torch.int64, device=device))
            cuda.waits.clear()
            generate(sampler, range(3), 3)
            found[name] = dict(cuda.waits)
        x_0_of = lambda indices: torch.zeros(len(indices), 3, 16, 16).to(device)
        measure_bits_per_dim(
            denoiser, x_0_of, np.arange(2), BoundOptions(t_stride=50, batch_size=8)
        )
    return found


def planted(where, name: str, fault, *what) -> dict:
    """What a training, of "faces" when nothing else is said, finds with this fault in it."""
    with mock.patch.object(where, name, fault):
        return training(*what or ("faces", SMALL_MODEL))


def mixed_types(norm, x):
    sizes = (*x.shape[:2], x[0, 0].numel())
    return torch.native_group_norm(x, norm.weight, norm.bias, *sizes, norm.num_groups, norm.eps)[0]


def reads_a_number(ema_model, model, step, decay, ramp):
    update_ema(ema_model, model, step, decay, ramp)
    next(model.parameters()).sum().item()


def other_strides(adam, group, *lists, init_group=Adam._init_group):
    result = init_group(adam, group, *lists)
    lists[2][:] = [
        moment.permute(*reversed(range(moment.dim()))).contiguous() for moment in lists[2]
    ]
    return result


SCENARIOS = {
    "faces": lambda: training("faces", steps=3),
    "faces-v": lambda: training("faces-v", precision="float16"),
    # Of 4 GB on the disk
    "ffhq-full": lambda: planted(book_keeping, "save_checkpoint", mock.Mock(), "ffhq-full"),
    "two GPUs": on_two_gpus,
    "sampling": sampling,
    "noise on the CPU": lambda: planted(
        train, "training_draws", lambda *args: training_draws(*args[:-1], "cpu")
    ),
    "norm of mixed types": lambda: planted(GroupNorm, "forward", mixed_types),
    "a number a step": lambda: planted(train, "update_ema", reads_a_number),
    "strides of Adam": lambda: planted(Adam, "_init_group", other_strides),
}


def main() -> None:
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
        print(
            json.dumps({"scenario": name, "seconds": time.perf_counter() - start, **found}),
            flush=True,
        )
    os._exit(0)  # C++'s last calls would find functions of ctypes that are gone


@pytest.fixture(scope="module")
def found() -> dict[str, dict]:
    """What each scenario found."""
    result = script("-m", "tests.test_pretended_cuda")
    if result.returncode == MISSING:
        pytest.skip(f"PyTorch {torch.__version__} lacks a private part: {result.stdout}")
    assert result.returncode == 0, result.stderr
    return {line["scenario"]: line for line in map(json.loads, result.stdout.splitlines())}


@pytest.mark.parametrize("name", ["faces", "faces-v", "ffhq-full", "two GPUs"])
def test_a_training_waits_only_where_it_logs(found, name):
    assert "error" not in found[name], found[name]["error"]
    in_steps, between = zip(*found[name]["steps"], strict=True)
    # After the first step DDP sends itself, once, in which order gradients came
    for waits in in_steps:
        assert not waits or (name == "two GPUs" and all("prediction.py" in line for line in waits))
    assert in_steps[-1] == between[0] == {}
    *_, log, last = between
    assert sum(log.values()) == (1 if len(between) == 3 else 0)  # after the second of three steps
    saving = ("support/files.py", "support/checkpoint.py", "metrics.py", "bad_numbers.py")
    assert (
        sum(count for line, count in last.items() if not any(file in line for file in saving)) <= 4
    )


def test_gradients_are_held_once(found):
    """None in the first pass of a step, or all in the one bucket that DDP has for so small a network."""
    passes = found["faces"]["held"]
    assert passes[::4] == [0, 0, 0] and passes[1] > 1
    assert set(found["two GPUs"]["held"]) == {1}


def test_sampling_waits_for_its_images_alone(found):
    assert "error" not in found["sampling"], found["sampling"]["error"]
    for name in SAMPLERS:
        assert list(found["sampling"][name].values()) == [1] and "copies to the CPU" in str(
            found["sampling"][name]
        )


def test_planted_faults_are_found(found):
    last_line = lambda name: found[name]["error"].splitlines()[-1]
    assert "at least two devices" in last_line("noise on the CPU")
    assert "types are mixed" in last_line("norm of mixed types")
    assert "strides" in last_line("strides of Adam")
    ((line, count),) = found["a number a step"]["steps"][1][0].items()
    assert (
        line.startswith("tests/test_pretended_cuda.py:")
        and line.endswith("reads a number")
        and count == 1
    )


if __name__ == "__main__":
    main()
