"""From a checkpoint to pictures: by the seed alone, with the flags' options, the right files.

test_bad_input.py has what is refused.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import sample
import train
from data.pixels import to_uint8
from functions.denoiser import Denoiser
from functions.noise_scheduler import NoiseScheduler
from functions.samplers import SAMPLERS, Sampler, ddim_sample
from functions.sampling.generation import generate
from functions.sampling.models import read_inputs
from functions.sampling.samples_folder import generate_frames
from functions.sampling.settings import SamplingConfig
from functions.support.command_line import run_script
from models.unet import UNet
from tests.conftest import (
    LittleMemory,
    call,
    changed,
    pipeline_of,
    refused,
)
from tests.functions.training.test_objectives_trained import assert_samples_are_the_grid


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_does_not_depend_on_its_batch(network, sampler):
    """It is the same to less than one of 255 levels. A batch may also consist of other images."""
    # It has memory for as many images as a call may have.
    limited = LittleMemory(network, 1)
    pipeline = pipeline_of(limited, 24, seed=7, sampler=sampler, steps=5, batch_size=1)
    one_by_one = generate(pipeline, range(4))
    for images, batch_size in ((range(4), 3), ([3, 1], 2)):
        limited.most = batch_size
        other = generate(changed(pipeline, batch_size=batch_size), images)
        assert (other - one_by_one[images]).abs().max() * 127.5 < 1
    # Another number is another image.
    first, second, *_ = one_by_one
    assert (first - second).abs().max() > 0.1


def test_a_cpu_samples_16_images_at_a_time_and_out_of_memory_names_the_flag(
    tiny_run, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(UNet, "forward", LittleMemory(lambda x_t, t: x_t, 16).forward)
    flags = ["--steps 2 --n 17 --device cpu --out", tmp_path]
    call(sample, tiny_run, *flags)
    with pytest.raises(SystemExit, match="2"):
        run_script(lambda: call(sample, tiny_run, *flags, "--batch-size 17"))
    error = capsys.readouterr().err
    assert "error: out of memory (CUDA out of memory. Tried to allocate 2 GiB)" in error
    assert "use a smaller --batch-size" in error


@pytest.mark.slow
def test_frames_are_evenly_spaced_and_end_with_the_image(network):
    """Of 60 steps every second one is recorded, and the last one."""
    pipeline = pipeline_of(network, 60, batch_size=2)
    samples, states, estimates = generate_frames(pipeline, range(3))
    assert torch.equal(samples, generate(pipeline, range(3)))
    assert list(estimates) == [*range(60, 1, -2), 1]
    assert list(states) == [*estimates, 0]
    images = to_uint8(samples)
    for frame, expected in (
        (states[60], to_uint8(pipeline.noise(range(3))())),
        (states[0], images),
        (estimates[1], images),
    ):
        assert np.array_equal(frame, expected)
    # The first x_0 is another image.
    assert abs(estimates[60].astype(float) - images).mean() > 10


def test_the_temperature_scales_the_noise_of_later_steps_alone(network, monkeypatch):
    def all_noise(denoiser, x_T, times, step_noise, **options):
        return torch.stack([x_T, *map(step_noise, range(len(times) - 1))])

    monkeypatch.setitem(SAMPLERS, "ddpm", replace(SAMPLERS["ddpm"], function=all_noise))
    pipeline = pipeline_of(network, steps=10)
    alpha_bar = torch.tensor([pipeline.scheduler.alpha_bar(t) for t in pipeline.times[1:]])
    late = torch.logit(alpha_bar) > -1
    assert 2 < late.sum() < 9
    # The noise of x_T comes first.
    scales = torch.tensor([1.0, *torch.where(late, 0.25, 1.0)]).view(-1, 1, 1, 1, 1)
    cooled = generate(changed(pipeline, temperature=0.25), [0, 1])
    assert_close(cooled, scales * generate(pipeline, [0, 1]))


def test_a_new_sampler_is_a_function_and_a_row(unfinished, tmp_path, monkeypatch):
    """The scripts and the grids of training know it."""
    row = Sampler(ddim_sample, {"spacing": "logsnr"})
    monkeypatch.setitem(SAMPLERS, "euler", row)
    call(train, "--resume", unfinished, "--diffusion.grid-sampler euler")
    assert_samples_are_the_grid(unfinished, "euler", tmp_path)


def test_an_input_that_the_network_can_do_without_may_be_left_out(tmp_path):
    """One without a default may not, and a file of nothing is a mistake."""

    def network(x_t, t, pose, age=None):
        return x_t

    known = {"pose": ([2], "float32"), "age": ([], "int64")}
    saved = SimpleNamespace(path="run", provenance={"inputs": known})
    models = SimpleNamespace(
        saved=saved, denoiser=Denoiser(network, NoiseScheduler(1000)), device=torch.device("cpu")
    )
    path = str(tmp_path / "some.npz")
    pose, age = np.ones((3, 2), np.float32), np.arange(3)
    for arrays in ({"pose": pose}, {"pose": pose, "age": age}):
        np.savez(path, **arrays)
        read = read_inputs(SamplingConfig(model="run", inputs=path), models)
        assert {name: value.tolist() for name, value in read.items()} == {
            name: value.tolist() for name, value in arrays.items()
        }
    for arrays in ({"age": age}, {}):
        np.savez(path, **arrays)
        with refused(r"some.npz has (age \(3,\)|none); run takes pose"):
            read_inputs(SamplingConfig(model="run", inputs=path), models)
