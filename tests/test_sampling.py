"""From a checkpoint to pictures: each image by its seed alone, and files that hold what they should."""

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import sampleFFHQ
from data.pixels import to_uint8
from functions.checkpoint import CheckpointError, load_weights
from functions.noise_scheduler import NoiseScheduler
from functions.sampling import frame_steps, generate, rebuild
from functions.visualize import SMALLEST_SIDE, plot_losses, save_gif, save_grid, save_strip
from models.unet import UNet
from tests.conftest import call, small_unet

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network():
    return small_unet()


@pytest.mark.parametrize(("steps", "eta"), [(None, 1.0), (20, 1.0), (20, 0.0)])
def test_an_image_does_not_depend_on_its_batch(network, steps, eta):
    def draw(images, batch_size):
        return generate(network, NoiseScheduler(100), images, (3, 16, 16), 7, batch_size, CPU, steps=steps, eta=eta,
                        frames_after=(0,), progress=False)  # fmt: skip

    one, three, all_at_once = (draw(range(7), batch_size) for batch_size in (1, 3, 7))
    some = draw([5, 2], 2)
    for other in (three, all_at_once):
        assert torch.equal(other.frames[0], one.frames[0])
        assert (other.images - one.images).abs().max() * 127.5 < 1
    assert torch.equal(some.frames[0], one.frames[0][[5, 2]])
    assert (some.images - one.images[[5, 2]]).abs().max() * 127.5 < 1
    assert (one.images[0] - one.images[1]).abs().max() > 0.1


def test_frames_begin_with_the_noise_and_end_with_the_image(network):
    steps = frame_steps(100, 9)
    samples = generate(network, NoiseScheduler(100), range(3), (3, 16, 16), 0, 2, CPU, frames_after=steps,
                       progress=False)  # fmt: skip
    assert steps[0] == 0
    assert steps[-1] == 100
    assert list(samples.frames) == steps
    assert abs(samples.frames[0].std() - 1) < 0.1
    assert torch.equal(samples.frames[100], samples.images)


def test_sampling_leaves_the_training_mode_as_it_was(network):
    network.train()
    generate(network, NoiseScheduler(100), range(1), (3, 16, 16), 0, 1, CPU, steps=1, progress=False)
    assert network.training


@pytest.mark.parametrize("count", [1, 3, 40, 200])
def test_frame_steps_are_rising_and_within_the_run(count):
    steps = frame_steps(100, max(count, 2))
    assert steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (0, 100)


def test_the_script_writes_what_was_asked_for(tiny_run, tmp_path, capsys):
    call(sample.main, tiny_run, "--n", 5, "--out", tmp_path, "--individual", "--strip", "--gif", "--seed", 3)
    grid = Image.open(tmp_path / "grid.png")
    assert grid.format == "PNG"
    assert grid.width > 3 * SMALLEST_SIDE
    with Image.open(tmp_path / "denoising.gif") as gif:
        assert gif.n_frames == len(frame_steps(100, 40))
    assert Image.open(tmp_path / "strip.png").width > 500
    singles = sorted(tmp_path.glob("0*.png"))
    assert [path.name for path in singles] == [f"{i:05d}.png" for i in range(5)]
    assert Image.open(singles[0]).size == (16, 16)
    printed = capsys.readouterr().out
    assert "EMA weights after 10 of 10 steps" in printed
    assert str(tmp_path / "grid.png") in printed

    # --individual images are the samples themselves, pixel for pixel
    weights, config, _ = load_weights(next((tiny_run / "checkpoints").glob("*10.pt")))
    model, scheduler = rebuild(UNet, weights, config, tiny_run, CPU)
    again = to_uint8(generate(model, scheduler, range(5), (3, 16, 16), 3, 64, CPU, progress=False).images).numpy()
    assert np.array_equal(again, np.stack([np.asarray(Image.open(path)) for path in singles]))


def test_an_exported_file_samples_the_same(tiny_run, tmp_path):
    call(sample.main, tiny_run, "--export", tmp_path / "faces.safetensors")
    call(sample.main, tmp_path / "faces.safetensors", "--n", 2, "--individual", "--out", tmp_path / "a")
    call(sample.main, tiny_run, "--n", 2, "--individual", "--out", tmp_path / "b")
    for name in ("00000.png", "00001.png", "grid.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_newest_run_is_taken_and_pictures_go_into_it(tiny_run, capsys):
    call(sample.main, "--runs", tiny_run.parent, "--n", 1, "--steps", 3)
    assert (tiny_run / "samples" / "step-00000010-ddim3-eta1-seed0" / "grid.png").exists()


def test_sample_ffhq_says_how_to_get_a_run(tiny_run, tmp_path):
    with pytest.raises(CheckpointError, match=r"python train\.py ffhq"):
        call(sampleFFHQ.main, "--runs", tiny_run.parent)


def test_sample_ffhq_draws_the_references_grid_and_animation(tiny_run, tmp_path):
    call(sampleFFHQ.main, tiny_run, "--steps", 2, "--out", tmp_path)
    grid = Image.open(tmp_path / "grid.png")
    assert grid.width / grid.height == pytest.approx(5 / 4, rel=0.02)
    assert (tmp_path / "denoising.gif").exists()


def test_a_config_that_does_not_fit_its_weights_is_refused(tiny_run):
    weights, config, _ = load_weights(next((tiny_run / "checkpoints").glob("*10.pt")))
    for model, message in (
        ({**config["model"], "base_dim": 16}, r"weights are missing|is \("),
        ({**config["model"], "norm_groups": 5}, "does not describe a model"),
        ({**config["model"], "unknown": 1}, "does not describe a model"),
        ({}, "does not describe a model"),
    ):
        with pytest.raises(CheckpointError, match=message):
            rebuild(UNet, weights, {**config, "model": model}, tiny_run, CPU)


def test_pictures_of_images(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 128, 128, 3), dtype=np.uint8)
    save_grid(images, tmp_path / "grid.png", columns=5)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (132, 5 * 130 + 2, 3)  # large images keep their pixels
    assert np.array_equal(grid[2:130, 132:260], images[1])
    save_gif([images, 255 - images], tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 2
    save_strip([images[:2], images[2:4], images[3:5]], ["a", "b", "c"], tmp_path / "strip.png")
    assert Image.open(tmp_path / "strip.png").width > Image.open(tmp_path / "strip.png").height


def test_loss_curves_are_drawn_from_the_metrics(tiny_run, tmp_path):
    plot_losses(tiny_run / "metrics.csv", tmp_path / "losses.png")
    assert Image.open(tmp_path / "losses.png").width >= 800
    (tmp_path / "metrics.csv").write_text("step,epoch,loss,val_loss,val_loss_ema\n")
    plot_losses(tmp_path / "metrics.csv", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
