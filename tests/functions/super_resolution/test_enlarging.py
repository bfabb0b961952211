"""Details at twice the size: what an enlargement keeps, and what it draws."""

import json
import math
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import edit
import evaluate
import sample
from functions.noise_scheduler import NoiseScheduler
from functions.samplers import dpm_solver_sample
from functions.sampling.generation import generate
from functions.sampling.inpainting import Known
from functions.sampling.models import Models, enlarged
from functions.saved.checkpoint import load_weights
from functions.saved.run_folder import checkpoints_of
from functions.super_resolution.details import LOG_SNR_SHIFT, STD
from functions.super_resolution.enlarging import enlarge, enlarging_times
from functions.support.random_numbers import image_noise
from tests.conftest import (
    CPU,
    call,
    changed,
    normal,
    pipeline_of,
    pixels_of,
    refused,
    samples_of,
    shrunk,
)
from tests.functions.known_denoisers import mean_and_variance, white

FEW = "--sampler dpm++ --steps 3 --n 3 --device cpu --guide 5"
# That of the details of images with cosine betas.
COSINE = NoiseScheduler(1000, beta_schedule="cosine", log_snr_shift=LOG_SNR_SHIFT)
# Images of this standard deviation, in units of that of details.
WHITE = white(0.2 / STD, COSINE)
SMALL = 0.1 * normal(0, 64, 3, 8, 8)


def test_images_shrink_to_the_small_ones_and_details_are_those_of_the_data():
    """White images are Gaussian in each direction that the small image leaves free.

    So their variance after these steps is known exactly.
    """
    large = enlarge(WHITE, SMALL, image_noise(3, range(64), (3, 16, 16), CPU, "image"))
    assert_close(shrunk(large), SMALL, atol=1e-3, rtol=0)
    bright = enlarge(WHITE, SMALL + 1, image_noise(3, range(64), (3, 16, 16), CPU, "image"))
    assert bright.max() < 1 + 1e-6

    # Each of 256 pixels alone, shrunk to 64: (256, 64).
    shrink = shrunk(torch.eye(256).view(256, 1, 16, 16)).flatten(1)
    free = torch.eye(256) - shrink @ torch.linalg.pinv(shrink)
    details = large.flatten(2) @ free
    times = enlarging_times(COSINE, 8)
    start = 0.0, 1 - COSINE.alpha_bar(times[0])
    _, variance = mean_and_variance(WHITE, dpm_solver_sample, times, start, eta=1)
    assert details.square().mean().item() == pytest.approx(0.75 * STD**2 * variance, rel=0.02)


def test_a_pixel_that_is_known_of_a_small_image_depends_on_no_unknown_one():
    """The truth is Pillow's Lanczos: what is unknown changes no pixel that is taken as known."""
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[5:8, 20:22] = True
    image, other = normal(0, 2, 3, 32, 32)
    small = torch.stack([image, torch.where(mask, other, image)])
    known = Known(image, mask)
    for _ in range(2):
        small, known = shrunk(small), known.halved()
        expected, unknown = known.at_size()
        assert_close(expected, small[0], rtol=0, atol=1e-5)
        assert_close(small[0][:, ~unknown], small[1][:, ~unknown], rtol=0, atol=1e-6)
        # They are put into images, of which the others stay nearly as they are if all agrees.
        [kept] = known.put_into(small[1:])
        assert_close(kept[:, ~unknown], expected[:, ~unknown], rtol=0, atol=1e-5)
        nothing = replace(known, mask=torch.ones_like(mask))
        assert_close(nothing.put_into(small), small, rtol=0, atol=1e-4)
    # The mask is above the middle, and its reach of 3 pixels at each size ends there.
    assert not unknown[6:].any()


def test_an_enlargement_shrinks_to_the_small_image_beside_known_pixels():
    """The small image agrees with them, as that of an inpainting does.

    test_editing.py has an inpainting, which keeps them and draws others.
    """
    large = (0.3 * normal(1, 3, 16, 16)).clamp(-1, 1)
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[:, :5] = True
    known = Known(large, mask)
    small = known.halved().put_into(0.1 * normal(2, 8, 3, 8, 8))
    noise = image_noise(3, range(8), (3, 16, 16), CPU, "image")
    drawn = enlarge(WHITE, small, noise, known.put_into)
    # They do but at the border.
    assert_close(shrunk(drawn)[..., 0], small[..., 0], atol=0.15, rtol=0)


@pytest.mark.parametrize("size, std", [(32, 0.0), (64, 0.03)])
def test_a_model_gets_images_of_64_pixels_and_more_with_noise(size, std):
    """The large image shrinks to the one without it all the same."""
    small = 0.1 * normal(0, 2, 3, size, size)
    noise = image_noise(3, range(2), (3, 2 * size, 2 * size), CPU, "image")
    with mock.patch.object(type(WHITE), "given", return_value=WHITE) as given:
        large = enlarge(WHITE, small, noise)
    added = given.call_args.kwargs["low"] - small
    assert added.std(dim=(1, 2, 3)).tolist() == pytest.approx([std] * 2, rel=0.03)
    first, second = added.flatten(1)
    assert abs(first @ second) <= 0.05 * first @ first
    assert_close(shrunk(large), small, atol=1e-3, rtol=0)


def test_steps_are_even_in_log_snr_and_for_small_images_in_t_whatever_the_schedule():
    shift = LOG_SNR_SHIFT - 2 * math.log(2)
    shifted = NoiseScheduler(1000, beta_schedule="cosine", log_snr_shift=shift)
    for scheduler in (COSINE, NoiseScheduler(1000), shifted):
        *times, last = enlarging_times(scheduler, 64)
        assert last == -1
        log_snr = torch.logit(scheduler.alphas_cumprod)[times] - LOG_SNR_SHIFT
        expected = torch.linspace(-1.41, 6, 7, dtype=torch.float64)
        assert_close(log_snr, expected, atol=0.15, rtol=0)
    assert enlarging_times(shifted, 63) == [499, 428, 356, 285, 213, 142, 70, -1]
    # A short schedule has fewer.
    short = NoiseScheduler(4, beta_schedule="cosine", log_snr_shift=LOG_SNR_SHIFT)
    for size in (32, 64):
        assert enlarging_times(short, size) == [2, 1, 0, -1]


def test_enlargements_depend_on_the_seed_and_the_index_alone(network):
    # All small images are nearly grey, so only the details' noise makes a difference.
    enlargers = tuple(Models(WHITE, (3, size, size), CPU) for size in (32, 64))
    models = {"denoiser": white(1e-3, COSINE), "enlargers": enlargers}
    pipeline = changed(pipeline_of(network, seed=7, sampler="dpm++", steps=2), models)
    together = generate(pipeline, [0, 1, 2])
    [alone], [cold], [other] = (
        generate(each, [2])
        # The temperature is that of the small images alone.
        for each in (pipeline, changed(pipeline, temperature=0.0), replace(pipeline, seed=8))
    )
    assert_close(together[2], alone, atol=1e-3, rtol=0)
    assert_close(cold, alone, atol=0.02, rtol=0)
    for image in (other, together[0]):
        assert (alone - image).abs().mean() > 0.02
        # So do those of the first enlargement.
        assert (shrunk(alone[None]) - shrunk(image[None])).abs().mean() > 0.02


def test_samples_shrink_to_the_small_ones_and_the_manifest_has_all_models(
    tiny_run, network, details_run, tmp_path, capsys
):
    plain, folder = tmp_path / "plain", tmp_path / "enlarged"
    call(sample, tiny_run, FEW, "--individual --out", plain)
    call(sample, tiny_run, FEW, "--individual --enlarge", details_run, "--out", folder)
    # The bar counts all steps.
    assert "30.0/30.0" in capsys.readouterr().err
    small, large_images = (
        torch.tensor(samples_of(path)).movedim(-1, 1).float() for path in (plain, folder)
    )
    # Not exactly, because this network's pixels are mostly clipped.
    error, other = ((shrunk(large_images) - x).abs().mean() for x in (small, small.roll(1, 0)))
    assert error < other / 2

    files = checkpoints_of(tiny_run)[0], checkpoints_of(details_run)[-1]
    guide, enlarger = (load_weights(file).digest[:16] for file in files)
    facts = json.loads((folder / "samples.json").read_text())
    assert (facts["guide"], facts["guidance"], facts["enlarge"]) == (guide, 1.5, [enlarger])
    models = replace(pipeline_of(network).models, precision="bfloat16")
    assert enlarged(models, details_run).enlargers[0].denoiser.precision == torch.bfloat16


def test_a_model_of_details_enlarges_and_draws_nothing_alone(tiny_run, details_run, tmp_path):
    alone = "draws the details of an image that it is given, and nothing alone"
    for script, *command in (
        (sample, details_run),
        (sample, tiny_run, "--guide", details_run),
        (evaluate, "bits", details_run),
    ):
        with refused(alone):
            call(script, *command, "--device cpu")
    with refused("diffusers has no such model .its network is 'details'"):
        call(sample, details_run, "--export", tmp_path / "folder")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("times", [1, 2])
def test_a_picture_of_any_shape_is_enlarged(times, details_run, here):
    """It shrinks to the picture, but for clipping and rounding; another seed has other details."""
    y, x = np.mgrid[:13, :18]
    picture = np.stack([60 + 8 * y, 60 + 5 * x, 200 - 6 * y], -1).astype(np.uint8)
    Image.fromarray(picture).save("face.png")
    command = ["enlarge face.png", details_run, f"--times {times} --device cpu --out"]
    for _ in range(2):
        call(edit, *command, "out")
    call(edit, *command, "other --seed 1")
    first, again, other = map(pixels_of, ("out/face.png", "out/face-2.png", "other/face.png"))
    assert first.shape == (13 * 2**times, 18 * 2**times, 3)
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    small = torch.from_numpy(first.copy()).movedim(-1, 0)[None].float()
    for _ in range(times):
        small = shrunk(small)
    assert (small[0].movedim(0, -1) - torch.from_numpy(picture)).abs().mean() < 3
