"""From a checkpoint to pictures: each image by its seed alone, and files that hold what they should."""

import contextlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import sampleFFHQ
from data.pixels import to_uint8
from functions.samplers import ipndm_sample
from functions.sampling.generation import Replayed, Samples, frame_steps, generate, generate_batches
from functions.sampling.options import SAMPLERS, SamplerOptions
from functions.support.errors import CheckpointError, UserError
from functions.support.pictures import SMALLEST_SIDE, save_grid
from tests.conftest import LittleMemory, call, image_sampler_of, small_unet

EVERY_SAMPLER = [
    pytest.param(SamplerOptions(), marks=pytest.mark.slow),
    SamplerOptions("ddpm", 5, variance="large"),
    SamplerOptions("ddim", 5, eta=0.5),
    *(SamplerOptions(name, 5, spacing="logsnr") for name in SAMPLERS),
]


@pytest.mark.parametrize("options", EVERY_SAMPLER, ids=str)
def test_an_image_does_not_depend_on_its_batch(network, options):
    sampler = image_sampler_of(network, 24, options, seed=7)
    one = generate(sampler, range(4), 1, {("x", 0)})
    for images, batch_size in ((range(4), 3), (range(4), 4), ([3, 1], 2)):
        other = generate(sampler, images, batch_size, {("x", 0)})
        assert np.array_equal(other.frames["x", 0], one.frames["x", 0][images])
        assert (other.images - one.images[images]).abs().max() * 127.5 < 1
    assert (one.images[0] - one.images[1]).abs().max() > 0.1


def test_a_network_replayed_as_a_cuda_graph_gives_the_same_images(network, monkeypatch):
    """A graph reads its own inputs and overwrites its output. iPNDM keeps four of those."""
    recorded = []

    def recording_network(x_t, t):
        recorded.append((x_t, t, network(x_t, t)))
        return recorded[-1][-1]

    class Graph:
        def replay(self):
            x_t, t, output = self.own
            output.copy_(network(x_t, t))

    @contextlib.contextmanager
    def recording(graph, capture_error_mode):
        yield
        graph.own = recorded[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    eager = image_sampler_of(network, options=SamplerOptions("ipndm", 8))
    replayed = replace(eager, denoiser=replace(eager.denoiser, network=Replayed(recording_network)))
    parts = list(generate_batches(replayed, [range(4), range(4, 8), range(8, 10)]))
    # Each size once, after a call that is not recorded
    assert [len(x_t) for x_t, *_ in recorded] == [4, 4, 2, 2]
    assert (Samples.joined(parts).images - generate(eager, range(10), 10).images).abs().max() < 1e-4
    x_T, samplers = eager.noise(range(1)).draw(), (replayed, eager)
    torch.testing.assert_close(
        *(ipndm_sample(one.denoiser, one.scheduler, x_T, 8, clip_x_0=False) for one in samplers)
    )


def test_what_does_not_fit_in_memory_is_halved_and_gives_the_same_images(network, capsys):
    # It runs out in the middle of sampling, as a GPU's allocator may
    class OftenLittleMemory(LittleMemory):
        def forward(self, x_t, t):
            return super().forward(x_t, t) if t[0] < 50 else self.network(x_t, t)

    halving, options = OftenLittleMemory(network, 3), SamplerOptions(steps=5)
    halved = generate(image_sampler_of(halving, options=options), range(7), 4)
    assert (
        capsys.readouterr().err.count("out of memory with 4 images at a time: going on with 2") == 1
    )
    assert halving.sizes == [2] * 6 + [1] * 2  # at two timesteps each: 4 = 2 2, 3 = 2 1
    whole = generate(image_sampler_of(network, options=options), range(7), 7)
    assert (halved.images - whole.images).abs().max() * 127.5 < 1


def test_no_memory_for_one_image_is_an_error_and_other_errors_are_not_hidden(network):
    with pytest.raises(
        UserError, match="no memory for a single image at a time on cpu: CUDA out of memory"
    ):
        generate(image_sampler_of(LittleMemory(network, 0)), range(4), 2)
    with pytest.raises(RuntimeError, match=r"expected input.* to have 3 channels"):
        generate(replace(image_sampler_of(network), shape=(4, 16, 16)), range(4), 2)


def test_what_is_kept_begins_with_the_noise_and_ends_with_the_image(network):
    frames, image_sampler = (
        {("x", 0), ("x", 12), ("x", 24), ("x_0", 1), ("x_0", 24)},
        image_sampler_of(network, 24),
    )
    network.train()
    samples = generate(image_sampler, range(3), 2, frames)
    assert network.training  # as it was
    images = to_uint8(samples.images).numpy()
    assert samples.frames.keys() == frames
    assert np.array_equal(
        samples.frames["x", 0], to_uint8(image_sampler.noise(range(3)).draw()).numpy()
    )
    assert np.array_equal(samples.frames["x", 24], images)
    assert np.array_equal(samples.frames["x_0", 24], images)  # the last x_0 is the image
    assert abs(samples.frames["x_0", 1].astype(float) - images).mean() > 10


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("options", EVERY_SAMPLER, ids=str)
def test_the_host_never_waits_for_the_gpu(options):
    image_sampler = image_sampler_of(small_unet().cuda(), options=options, device="cuda")
    noise = image_sampler.noise(range(4))
    image_sampler.decode(noise.draw(), 99, noise.draw)  # the first call loads kernels
    # From the end of the first step on waiting is an error; before, it may wait to make the tables
    on_step = lambda k, t, x, x_0: torch.cuda.set_sync_debug_mode("error")
    try:
        image_sampler.decode(noise.draw(), 99, noise.draw, on_step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("count", [2, 3, 40, 200])
def test_frame_steps_are_rising_and_within_the_run(count):
    steps = frame_steps(100, count)
    assert steps == sorted(set(steps)) and (steps[0], steps[-1]) == (0, 100)


@pytest.mark.slow
def test_the_script_writes_what_was_asked_for(tiny_run, tmp_path, capsys):
    call(
        sample.main,
        tiny_run,
        "--n",
        5,
        "--steps",
        60,
        "--out",
        tmp_path,
        "--strip",
        "--progressive",
        "--gif",
    )
    grid = Image.open(tmp_path / "grid.png")
    assert grid.format == "PNG" and grid.width > 3 * SMALLEST_SIDE
    assert Image.open(tmp_path / "denoising.gif").n_frames == len(frame_steps(60, 40))
    assert min(Image.open(tmp_path / name).width for name in ("strip.png", "progressive.png")) > 500
    printed = capsys.readouterr().out
    assert "EMA weights after 10 of 10 steps" in printed and str(tmp_path / "grid.png") in printed


def test_an_exported_file_samples_the_same(tiny_run, tmp_path):
    call(sample.main, tiny_run, "--export", tmp_path / "faces.safetensors")
    for model, folder in ((tmp_path / "faces.safetensors", "a"), (tiny_run, "b")):
        call(sample.main, model, "--n", 2, "--steps", 5, "--individual", "--out", tmp_path / folder)
    for name in ("00000.png", "00001.png", "grid.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_newest_run_is_taken_and_pictures_go_into_it(tiny_run):
    call(sample.main, "--runs", tiny_run.parent, "--n", 1, "--steps", 3)
    assert (tiny_run / "samples" / "step-00000010-ddpm3-seed0" / "grid.png").exists()


def test_sample_ffhq_takes_ffhq_runs_alone_and_writes_the_references_grid_and_animation(
    tiny_run, tmp_path
):
    with pytest.raises(CheckpointError, match=r"no run of an experiment ffhq\*"):
        call(sampleFFHQ.main, "--runs", tiny_run.parent)
    call(sampleFFHQ.main, tiny_run, "--steps", 2, "--out", tmp_path)
    grid = Image.open(tmp_path / "grid.png")
    assert (
        grid.width / grid.height == pytest.approx(5 / 4, rel=0.02)
        and (tmp_path / "denoising.gif").exists()
    )


def test_large_images_keep_their_pixels_in_a_grid(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 128, 128, 3), dtype=np.uint8)
    save_grid(images, tmp_path / "grid.png", columns=5)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (132, 5 * 130 + 2, 3)
    assert np.array_equal(grid[2:130, 132:260], images[1])
