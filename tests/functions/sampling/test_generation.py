"""From a checkpoint to pictures: each image by its seed alone, and files that hold what they should."""

import copy
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import sampleFFHQ
from data.pixels import to_uint8
from functions.sampling.generation import ImageSampler, frame_steps, generate, rebuild
from functions.sampling.options import SAMPLERS, SamplerOptions
from functions.support.checkpoint import load_weights
from functions.support.errors import CheckpointError, UserError
from functions.support.pictures import SMALLEST_SIDE, save_gif, save_grid, save_strip
from functions.training.metrics import plot_losses
from models.unet import UNet
from tests.conftest import call, image_sampler_of, small_unet

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network():
    return small_unet()


EVERY_SAMPLER = [SamplerOptions(), SamplerOptions("ddpm", 8, variance="large"), SamplerOptions("ddim", 8, eta=0.5),
                 *(SamplerOptions(name, 8, spacing="logsnr") for name in SAMPLERS)]  # fmt: skip


@pytest.mark.parametrize("options", EVERY_SAMPLER, ids=str)
def test_an_image_does_not_depend_on_its_batch(network, options):
    def sample_images(images, batch_size):
        return generate(image_sampler_of(network, 30, options, seed=7), images, batch_size, {("x", 0)})

    one, three, all_at_once = (sample_images(range(5), batch_size) for batch_size in (1, 3, 5))
    some = sample_images([4, 2], 2)
    for other in (three, all_at_once):
        assert np.array_equal(other.frames["x", 0], one.frames["x", 0])
        assert (other.images - one.images).abs().max() * 127.5 < 1
    assert np.array_equal(some.frames["x", 0], one.frames["x", 0][[4, 2]])
    assert (some.images - one.images[[4, 2]]).abs().max() * 127.5 < 1
    assert (one.images[0] - one.images[1]).abs().max() > 0.1


def test_what_does_not_fit_in_memory_is_halved_and_gives_the_same_images(network, capsys):
    sizes = []

    class Small(torch.nn.Module):
        """Has memory for 3 images; it says so in the middle of sampling, as a GPU's allocator may."""

        def forward(self, x_t, t):
            sizes.append(len(x_t))
            if len(x_t) > 3 and t[0] < 50:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return network(x_t, t)

    sample_images = lambda model, size: generate(
        image_sampler_of(model, options=SamplerOptions(steps=5)), range(13), size
    )
    halved = sample_images(Small(), 8)
    errors = capsys.readouterr().err
    assert "out of memory with 8 images at a time: going on with 4" in errors
    assert "out of memory with 4 images at a time: going on with 2" in errors
    assert sizes[-5:] == [1] * 5  # 8 = 2 2 2 2, 5 = 2 2 1
    assert (halved.images - sample_images(network, 13).images).abs().max() * 127.5 < 1


def test_no_memory_for_one_image_is_an_error_and_other_errors_are_not_hidden(network):
    def fail(error):
        def forward(x_t, t):
            raise error

        model = torch.nn.Module()
        model.forward = forward
        return generate(image_sampler_of(model, 30), range(4), 2)

    with pytest.raises(UserError, match="no memory for a single image at a time on cpu: CUDA out of memory"):
        fail(torch.OutOfMemoryError("CUDA out of memory.\nA long text"))
    with pytest.raises(RuntimeError, match="something else"):
        fail(RuntimeError("something else"))


def test_what_is_kept_begins_with_the_noise_and_ends_with_the_image(network):
    states, predictions = [("x", k) for k in (0, 60, 100)], [("x_0", k) for k in (1, 50, 100)]
    image_sampler = image_sampler_of(network)
    samples = generate(image_sampler, range(3), 2, {*states, *predictions})
    images = to_uint8(samples.images).numpy()
    assert samples.frames.keys() == {*states, *predictions}
    assert np.array_equal(samples.frames["x", 0], to_uint8(image_sampler.noise(range(3)).draw()).numpy())
    assert np.array_equal(samples.frames["x", 100], images)
    assert np.array_equal(samples.frames["x_0", 100], images)  # the last x_0 is the image
    assert abs(samples.frames["x_0", 1].astype(float) - images).mean() > 10


def test_fewer_steps_of_ddpm_are_those_of_ddim_with_eta_1(network):
    ddpm, ddim = (
        generate(image_sampler_of(network, options=options), range(2), 2).images
        for options in (SamplerOptions(steps=10), SamplerOptions("ddim", 10, eta=1.0))
    )
    torch.testing.assert_close(ddpm, ddim, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("options", EVERY_SAMPLER, ids=str)
def test_the_host_never_waits_for_the_gpu(network, options):
    device = torch.device("cuda")
    image_sampler = image_sampler_of(copy.deepcopy(network).to(device), options=options, device=device)
    noise = image_sampler.noise(range(4))
    image_sampler.decode(noise.draw(), 99, noise.draw)  # the first call loads kernels
    x_T, torch_mode = noise.draw(), torch.cuda.get_sync_debug_mode()
    waits = []  # how often it has waited by the end of each step; before the first one it may, to make the tables
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            image_sampler.decode(x_T, 99, noise.draw, lambda k, t, x, x_0: waits.append(len(caught)))
        finally:
            torch.cuda.set_sync_debug_mode(torch_mode)
    assert len(set(waits)) == 1, [str(warning.message) for warning in caught]


def test_sampling_leaves_the_training_mode_as_it_was(network):
    network.train()
    generate(image_sampler_of(network, options=SamplerOptions(steps=1)), range(1), 1)
    assert network.training


@pytest.mark.parametrize("count", [1, 3, 40, 200])
def test_frame_steps_are_rising_and_within_the_run(count):
    steps = frame_steps(100, max(count, 2))
    assert steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (0, 100)


def test_the_script_writes_what_was_asked_for(tiny_run, tmp_path, capsys):
    call(sample.main, tiny_run, "--n", 5, "--out", tmp_path, "--individual", "--strip", "--progressive", "--gif",
         "--seed", 3)  # fmt: skip
    grid = Image.open(tmp_path / "grid.png")
    assert grid.format == "PNG"
    assert grid.width > 3 * SMALLEST_SIDE
    with Image.open(tmp_path / "denoising.gif") as gif:
        assert gif.n_frames == len(frame_steps(100, 40))
    assert Image.open(tmp_path / "strip.png").width > 500
    assert Image.open(tmp_path / "progressive.png").width > 500
    singles = sorted(tmp_path.glob("0*.png"))
    assert [path.name for path in singles] == [f"{i:05d}.png" for i in range(5)]
    assert Image.open(singles[0]).size == (16, 16)
    printed = capsys.readouterr().out
    assert "EMA weights after 10 of 10 steps" in printed
    assert str(tmp_path / "grid.png") in printed

    # --individual images are the samples themselves, pixel for pixel
    saved = load_weights(next((tiny_run / "checkpoints").glob("*10.safetensors")))
    image_sampler = ImageSampler(rebuild(UNet, saved, CPU), SamplerOptions(), (3, 16, 16), 3, CPU)
    again = to_uint8(generate(image_sampler, range(5), 64).images).numpy()
    assert np.array_equal(again, np.stack([np.asarray(Image.open(path)) for path in singles]))


def test_an_exported_file_samples_the_same(tiny_run, tmp_path):
    call(sample.main, tiny_run, "--export", tmp_path / "faces.safetensors")
    call(sample.main, tmp_path / "faces.safetensors", "--n", 2, "--individual", "--out", tmp_path / "a")
    call(sample.main, tiny_run, "--n", 2, "--individual", "--out", tmp_path / "b")
    for name in ("00000.png", "00001.png", "grid.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_newest_run_is_taken_and_pictures_go_into_it(tiny_run, capsys):
    call(sample.main, "--runs", tiny_run.parent, "--n", 1, "--steps", 3)
    assert (tiny_run / "samples" / "step-00000010-ddpm3-seed0" / "grid.png").exists()


def test_sample_ffhq_takes_ffhq_runs_alone(tiny_run):
    with pytest.raises(CheckpointError, match=r"no run of an experiment ffhq\*"):
        call(sampleFFHQ.main, "--runs", tiny_run.parent)


def test_sample_ffhq_writes_the_references_grid_and_animation(tiny_run, tmp_path):
    call(sampleFFHQ.main, tiny_run, "--steps", 2, "--out", tmp_path)
    grid = Image.open(tmp_path / "grid.png")
    assert grid.width / grid.height == pytest.approx(5 / 4, rel=0.02)
    assert (tmp_path / "denoising.gif").exists()


def test_a_config_that_does_not_fit_its_weights_is_refused(tiny_run):
    saved = load_weights(next((tiny_run / "checkpoints").glob("*10.safetensors")))
    for model, message in (
        ({**saved.config["model"], "base_dim": 16}, "weights are missing|is torch.float32"),
        ({**saved.config["model"], "norm_groups": 5}, "describes no model"),
        ({**saved.config["model"], "unknown": 1}, "describes no model"),
        ({}, "describes no model"),
    ):
        with pytest.raises(CheckpointError, match=message):
            rebuild(UNet, replace(saved, config={**saved.config, "model": model}), CPU)


def test_pictures_of_images(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 128, 128, 3), dtype=np.uint8)
    save_grid(images, tmp_path / "grid.png", columns=5)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (132, 5 * 130 + 2, 3)  # large images keep their pixels
    assert np.array_equal(grid[2:130, 132:260], images[1])
    save_gif([images, 255 - images], tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 2
    for row_titles in ((), ("first", "second")):
        save_strip([images[:2], images[2:4], images[3:5]], ["a", "b", "c"], tmp_path / "strip.png", row_titles)
        assert Image.open(tmp_path / "strip.png").width > Image.open(tmp_path / "strip.png").height


def test_loss_curves_are_drawn_from_the_metrics(tiny_run, tmp_path):
    plot_losses(tiny_run / "metrics.csv", tmp_path / "losses.png")
    assert Image.open(tmp_path / "losses.png").width >= 800
