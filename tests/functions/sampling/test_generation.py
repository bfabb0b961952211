"""From a checkpoint to pictures: each image by its seed alone, and files with the right content."""

import contextlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import sampleFFHQ
from data.pixels import to_uint8
from functions.samplers import SAMPLERS, ipndm_sample
from functions.sampling.cuda_graph import CudaGraphed
from functions.sampling.files import GIF_FRAMES, state_frames
from functions.sampling.generation import Samples, generate, generate_batches
from functions.sampling.options import SamplerOptions
from functions.support.errors import CheckpointError, UserError
from functions.support.pictures import MIN_SIDE, save_grid
from tests.conftest import LittleMemory, call, image_sampler_of, small_unet

# They all have few steps, but for the first: it has all.
EVERY_SAMPLER = [
    pytest.param(SamplerOptions(), marks=pytest.mark.slow),
    SamplerOptions("ddpm", 5, variance="large"),
    SamplerOptions("ddim", 5, eta=0.5),
    *(SamplerOptions(name, 5, spacing="logsnr") for name in SAMPLERS),
]


@pytest.mark.parametrize("options", EVERY_SAMPLER, ids=str)
def test_an_image_does_not_depend_on_its_batch(network, options):
    """Its noise is the same bit for bit, and the image is so to less than one of 255 levels."""
    sampler = image_sampler_of(network, 24, options, seed=7)
    one_by_one = generate(replace(sampler, batch_size=1), range(4), {("x", 0)})
    for images, batch_size in ((range(4), 3), (range(4), 4), ([3, 1], 2)):
        other = generate(replace(sampler, batch_size=batch_size), images, {("x", 0)})
        assert np.array_equal(other.frames["x", 0], one_by_one.frames["x", 0][images])
        assert (other.images - one_by_one.images[images]).abs().max() * 127.5 < 1

    # Another number is another image.
    first, second, *_ = one_by_one.images
    assert (first - second).abs().max() > 0.1


def test_a_network_replayed_as_a_cuda_graph_gives_the_same_images(network, monkeypatch):
    """The images are those of the plain network.

    A graph reads its own inputs and overwrites its output, and so does the stand-in here. iPNDM
    keeps four outputs, which must not be overwritten.
    """
    recorded = []

    def recording_network(x_t, t):
        output = network(x_t, t)
        recorded.append((x_t, t, output))
        return output

    class Graph:
        def replay(self):
            x_t, t, output = self.tensors
            output.copy_(network(x_t, t))

    @contextlib.contextmanager
    def recording(graph, capture_error_mode):
        yield
        graph.tensors = recorded[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    eager = image_sampler_of(network, options=SamplerOptions("ipndm", 8))
    replayed = replace(
        eager, denoiser=replace(eager.denoiser, network=CudaGraphed(recording_network))
    )
    parts = list(generate_batches(replayed, [range(4), range(4, 8), range(8, 10)]))

    # Each size of batch is recorded once, after a call that is not recorded.
    assert [len(x_t) for x_t, *_ in recorded] == [4, 4, 2, 2]
    images = Samples.concatenated(parts).images
    assert (images - generate(eager, range(10)).images).abs().max() < 1e-4

    # The sampler by itself, without clipping, gives the same, too.
    x_T = eager.noise(range(1)).draw()
    found = ipndm_sample(replayed.denoiser, replayed.scheduler, x_T, 8, clip_x_0=False)
    expected = ipndm_sample(eager.denoiser, eager.scheduler, x_T, 8, clip_x_0=False)
    torch.testing.assert_close(found, expected)


def failing_graph(monkeypatch, network, error):
    """Let recording the network fail; return the network, and the streams that are set after it.

    As PyTorch's does, the end of the recording raises an error of its own, on a stream of its own.
    """
    streams = ["the stream before"]
    recording = []

    @contextlib.contextmanager
    def graph(graph, capture_error_mode):
        streams.append("the recording's stream")
        recording.append(True)
        try:
            yield
        finally:
            recording.clear()
            raise RuntimeError("operation failed due to a previous error during capture")

    def failing_network(x_t, t):
        if recording:
            raise error
        return network(x_t, t)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    monkeypatch.setattr(CudaGraphed, "can_record", True)
    return CudaGraphed(failing_network), streams


def test_a_network_that_cannot_be_recorded_is_called_as_it_is(network, monkeypatch, capsys):
    error = RuntimeError("operation not permitted when stream is capturing")
    replayed, streams = failing_graph(monkeypatch, network, error)
    sampler = image_sampler_of(network, options=SamplerOptions("ddim", 4))
    expected = generate(replace(sampler, batch_size=2), range(3)).images
    unrecorded = replace(sampler, denoiser=replace(sampler.denoiser, network=replayed))
    parts = list(generate_batches(unrecorded, [range(2), range(2, 3)]))

    assert torch.equal(Samples.concatenated(parts).images, expected)
    # It was tried once, and said in one line, which has the error that matters.
    assert streams == ["the stream before", "the recording's stream", "the stream before"]
    assert capsys.readouterr().err.splitlines() == [
        "the network cannot be recorded as a CUDA graph, so it runs without one, which is "
        f"slower: {error}"
    ]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt()]
)
def test_other_errors_while_recording_are_passed_on(network, monkeypatch, error):
    replayed, streams = failing_graph(monkeypatch, network, error)
    with pytest.raises(type(error)) as raised:
        replayed(torch.zeros(1, 3, 16, 16), torch.zeros(1, dtype=torch.int64))
    assert raised.value is error
    assert streams[-1] == "the stream before"


def test_what_does_not_fit_in_memory_is_halved_and_gives_the_same_images(network, capsys):
    class LittleMemoryLater(LittleMemory):
        """It runs out in the middle of sampling, as a GPU's allocator may."""

        def forward(self, x_t, t):
            if t[0] >= 50:
                return self.network(x_t, t)
            return super().forward(x_t, t)

    halving = LittleMemoryLater(network, 3)
    options = SamplerOptions(steps=5)
    by_four = replace(image_sampler_of(halving, options=options), batch_size=4)
    halved = generate(by_four, range(7))
    message = "out of memory with 4 images at a time: continuing with 2"
    assert capsys.readouterr().err.count(message) == 1

    # Of the batches 4 and 3, the first becomes 2 and 2, and the second 2 and 1. Each comes twice,
    # as two of the timesteps are below 50.
    assert halving.sizes == [2] * 6 + [1] * 2
    whole = generate(image_sampler_of(network, options=options), range(7))
    assert (halved.images - whole.images).abs().max() * 127.5 < 1


def test_no_memory_for_one_image_is_an_error_and_other_errors_are_not_hidden(network):
    message = "not enough memory for even one image on cpu: CUDA out of memory"
    with pytest.raises(UserError, match=message):
        generate(image_sampler_of(LittleMemory(network, 0)), range(4))

    four_channels = replace(image_sampler_of(network), shape=(4, 16, 16))
    with pytest.raises(RuntimeError, match=r"expected input.* to have 3 channels"):
        generate(four_channels, range(4))


def test_what_is_kept_begins_with_the_noise_and_ends_with_the_image(network):
    image_sampler = replace(image_sampler_of(network, 24), batch_size=2)
    frames = {("x", 0), ("x", 12), ("x", 24), ("x_0", 1), ("x_0", 24)}
    network.train()
    samples = generate(image_sampler, range(3), frames)

    # Sampling leaves the network in the mode that it was in.
    assert network.training
    images = to_uint8(samples.images).numpy()
    noise = to_uint8(image_sampler.noise(range(3)).draw()).numpy()
    assert samples.frames.keys() == frames
    assert np.array_equal(samples.frames["x", 0], noise)
    assert np.array_equal(samples.frames["x", 24], images)

    # The last x_0 is the image; the first is another.
    assert np.array_equal(samples.frames["x_0", 24], images)
    assert abs(samples.frames["x_0", 1].astype(float) - images).mean() > 10


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("options", EVERY_SAMPLER, ids=str)
def test_the_host_never_waits_for_the_gpu(options):
    image_sampler = image_sampler_of(small_unet().cuda(), options=options, device="cuda")
    noise = image_sampler.noise(range(4))

    # The first call loads kernels, for which the host waits.
    image_sampler.denoise(noise.draw(), 99, noise.draw)

    def on_step(k, t, x, x_0):
        """Make waiting an error, from the end of the first step on.

        Before, the host may wait while it makes the tables.
        """
        torch.cuda.set_sync_debug_mode("error")

    try:
        replace(image_sampler, on_step=on_step).denoise(noise.draw(), 99, noise.draw)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("count", [2, 3, 40, 200])
def test_states_are_rising_and_within_the_steps(count, network):
    image_sampler = image_sampler_of(network, options=SamplerOptions())
    steps = [k for _, k in state_frames(image_sampler, count).values()]
    assert steps == sorted(set(steps))
    assert steps[0] == 0
    assert steps[-1] == 100


@pytest.mark.slow
def test_the_script_writes_what_was_asked_for(tiny_run, network, tmp_path, capsys):
    flags = "--n 5 --steps 60 --strip --progressive --gif"
    call(sample.main, tiny_run, *flags.split(), "--out", tmp_path)
    grid = Image.open(tmp_path / "grid.png")
    assert grid.format == "PNG"
    assert grid.width > 3 * MIN_SIDE
    assert Image.open(tmp_path / "denoising.gif").n_frames == len(
        state_frames(image_sampler_of(network, 60, SamplerOptions()), GIF_FRAMES)
    )
    assert Image.open(tmp_path / "strip.png").width > 500
    assert Image.open(tmp_path / "progressive.png").width > 500
    printed = capsys.readouterr().out
    assert "EMA weights after 10 of 10 steps" in printed
    assert str(tmp_path / "grid.png") in printed


def test_sample_ffhq_takes_ffhq_runs_alone_and_writes_the_references_grid_and_animation(
    tiny_run, tmp_path
):
    with pytest.raises(CheckpointError, match=r"no run of an experiment ffhq\*"):
        call(sampleFFHQ.main, "--runs", tiny_run.parent)

    call(sampleFFHQ.main, tiny_run, "--steps", 2, "--out", tmp_path)
    grid = Image.open(tmp_path / "grid.png")
    assert grid.width / grid.height == pytest.approx(5 / 4, rel=0.02)
    assert (tmp_path / "denoising.gif").exists()


def test_large_images_keep_their_pixels_in_a_grid(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 128, 128, 3), dtype=np.uint8)
    save_grid(images, tmp_path / "grid.png", columns=5)

    # Each image has a frame of 2 pixels, which it shares with its neighbours.
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (132, 5 * 130 + 2, 3)
    assert np.array_equal(grid[2:130, 132:260], images[1])
