"""Inpainting, interpolation and variations: exact where the truth is known, and as files.

Inpainting is compared with the exact mean and variance of its chain. The data are correlated
Gaussian pixels, for which the ideal network is known, too.
"""

from itertools import pairwise
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import edit
import sample
from data.pictures import fit_image, open_image_file
from functions.noise_scheduler import NoiseScheduler
from functions.samplers import ddpm_sample
from functions.sampling import editing
from functions.sampling.editing import (
    inpaint,
    interpolate_images,
    read_with_mask,
    variations,
)
from functions.sampling.inpainting import Known
from functions.timesteps import sampling_times
from tests.conftest import (
    call,
    changed,
    normal,
    pipeline_of,
    refused,
    samples_of,
)
from tests.functions.known_denoisers import white

SCHEDULER = NoiseScheduler(1000)
# An image has two pixels that are alike. The first one is kept, and the second one is new.
COVARIANCE = torch.tensor([[1.0, 0.9], [0.9, 1.0]]).double()
KEPT = torch.tensor([1.5, 0.0]).double()
NEW = torch.tensor([False, True])
# Each channel is a sample of its own, as one generator draws many numbers sooner than many do.
CHANNELS = 100


def ideal_x_0(a):
    """Return the matrix M (2, 2) at alpha_bar = a of E[x_0 | x_t] = M x_t.

    The data are N(0, COVARIANCE), so x_t has the covariance that is inverted here.
    """
    covariance = a * COVARIANCE + (1 - a) * torch.eye(2).double()
    return a**0.5 * COVARIANCE @ torch.linalg.inv(covariance)


def ideal_eps(x_t, t):
    """Return E[eps | x_t], of each channel by itself."""
    a = SCHEDULER.alpha_bar(t[0].item())
    x_0 = x_t.double() @ ideal_x_0(a).T
    return ((x_t - a**0.5 * x_0) / (1 - a) ** 0.5).float()


def chain(steps, resample):
    """Return the mean and the variance that inpainting gives to the new pixel.

    Both are exact: each operation of the chain is linear, with Gaussian noise.
    """
    eye = torch.eye(2).double()
    new = NEW.double().diag()
    mean = torch.zeros(2).double()
    covariance = eye
    for t, s in pairwise(sampling_times(SCHEDULER, steps)):
        a_s = SCHEDULER.alpha_bar(s)
        beta = SCHEDULER.step_beta(t, s)
        # The mean of Eq. 7 is linear in x_0 and x_t, so that of the matrices is its matrix.
        x_0 = ideal_x_0(SCHEDULER.alpha_bar(t))
        step, variance = SCHEDULER.q_posterior(x_0, eye, t, s)
        # The kept pixel is replaced by itself with the noise of s, drawn independently.
        replaced = new @ step, variance * new + (1 - a_s) * (eye - new), a_s**0.5 * KEPT
        # All repeats but the first begin with the noise that takes x from s back to t.
        back = (1 - beta) ** 0.5 * eye, beta * eye, 0.0
        # The last step is done once.
        repeats = resample - 1 if s >= 0 else 0
        for matrix, noise, shift in [replaced, *[back, replaced] * repeats]:
            mean = matrix @ mean + shift
            covariance = matrix @ covariance @ matrix.T + noise
    return mean[1].item(), covariance[1, 1].item()


def test_samples_have_the_mean_and_variance_of_the_chain():
    """They agree within 4 standard errors of 20,000 samples."""
    N = 20_000
    models = {"shape": (CHANNELS, 1, 2), "clip_x_0": False}
    pipeline = changed(pipeline_of(ideal_eps, 1000, steps=10), models)
    known = Known(KEPT.float().expand(CHANNELS, 1, 2), NEW[None])
    kept, new = inpaint(pipeline, known, 4, range(N // CHANNELS)).view(N, 2).T
    assert (kept == 1.5).all()

    mean, variance = chain(steps=10, resample=4)
    assert new.mean().item() == pytest.approx(mean, abs=4 * (variance / N) ** 0.5)
    assert new.var().item() == pytest.approx(variance, rel=4 * (2 / N) ** 0.5)


@pytest.fixture
def photo(here):
    """Go to a folder with a photo of 40 x 20 pixels, masks of it, and the photo with a part erased.

    The erased part is that of mask.png.
    """
    pixels = np.random.default_rng(0).integers(0, 256, (20, 40, 3), np.uint8)

    # The photo is cropped to its middle, 20 x 20 pixels, which has 4 columns of the mask.
    mask = np.zeros((20, 40), np.uint8)
    mask[:, :14] = 255
    images = {
        "photo": pixels,
        "erased": np.dstack([pixels, 255 - mask]),
        "mask": mask,
        "small": mask[:10],
        "full": 0 * mask + 255,
    }
    for name, image in images.items():
        Image.fromarray(image).save(f"{name}.png")


@pytest.mark.parametrize("files", [("photo.png", "mask.png"), ("erased.png", None)])
def test_image_and_mask_are_cropped_and_resized_alike(files, photo):
    # 4 of 20 columns are masked, which are 3.2 of 16. A column that is masked in part is masked.
    image, anew = read_with_mask(*files, (3, 16, 16))
    assert anew[:, :4].all()
    assert not anew[:, 4:].any()

    # Farther from the mask the image is the photo itself.
    whole = fit_image(open_image_file("photo.png"), (3, 16, 16))
    assert np.array_equal(image[:, 8:], whole[:, 8:])


@pytest.mark.parametrize(
    "files, message",
    [
        (("photo.png", "small.png"), "40x10 pixels, its image 40x20; a mask must be as large"),
        (("photo.png", "full.png"), "everything or nothing would be inpainted"),
        (("photo.png", None), "in the middle square .*; give a --mask .* or erase"),
    ],
)
def test_masks_that_do_not_fit_are_refused(files, message, photo):
    with refused(message):
        read_with_mask(*files, (3, 16, 16))


@pytest.fixture
def saved(monkeypatch):
    """Return the stand-in for what writes figures and grids, which keeps what it is called with."""
    save = Mock()
    monkeypatch.setattr(editing, "save_strip", save)
    monkeypatch.setattr(editing, "save_grid", save)
    return save


def test_the_script_paints_what_is_erased_and_keeps_the_rest(photo, tiny_run, details_run, saved):
    """With --enlarge the photo is read, and kept, at the size of the enlarged images."""
    flags = "--sampler ddim --eta 1 --steps 4 --n 3 --batch-size 2 --out out"
    call(edit, "inpaint erased.png", tiny_run, flags, "--enlarge", details_run)
    shown, known, *answers = saved.call_args.args[0]
    image, anew = read_with_mask("erased.png", None, (3, 32, 32))
    assert np.array_equal(shown, image)
    assert (known[anew] == 128).all()
    assert len(answers) == 3
    for answer in (known, *answers):
        assert np.array_equal(answer[~anew], image[~anew])
        assert not np.array_equal(answer[anew], image[anew])
    assert not np.array_equal(*answers[:2])


def test_enlarged_images_of_the_seed_are_those_of_sample(tiny_run, details_run, tmp_path, saved):
    """Both ends of a row are, and what comes back of them is enlarged with noise of its own."""
    flags = f"--steps 5 --batch-size 4 --device cpu --enlarge {details_run} --out"
    common = [tiny_run, flags, tmp_path]
    call(sample, *common, "--individual --indices 1 3")
    first, third = samples_of(tmp_path).astype(float)
    call(edit, "interpolate 1 3", *common, "--depths 0 0.2 0.295 1")
    columns, _, rows = saved.call_args.args
    # The sampler's 5 steps visit 0, 20, 40, 60, 80 and 100.
    assert rows == [f"noised to\nt = {t}" for t in (0, 20, 100)]
    begin, mixture, *_, end = columns.values()
    assert abs(begin - first).max() <= 1
    assert abs(end - third).max() <= 1
    # At depth 0 the mixture with all of an end is that end, but for its details.
    assert 0 < abs(mixture[0] - first).mean() < abs(mixture[0] - third).mean() / 2

    call(edit, "vary 3", *common, "--depths 0")
    image, *variations = saved.call_args.args[0].values()
    assert abs(image - third).max() <= 1
    assert not np.array_equal(*variations[:2])


# They give one end, a mixture, and the other end.
WEIGHTS = torch.tensor([0.0, 0.3, 1.0])


def test_between_two_images_is_what_comes_back_of_mixtures(network):
    """Both ends are noised with the same noise, and all are sampled with the noise after it."""
    pipeline = pipeline_of(network, seed=5, steps=10)
    ends = pipeline.noise([0, 1])().clamp(-1, 1)
    row = interpolate_images(pipeline, ends, 49, WEIGHTS)

    noise = pipeline.noise([0], "interpolation")
    first, second = pipeline.scheduler.q_sample(ends, 49, noise())
    x_t = torch.lerp(first, second, WEIGHTS.view(-1, 1, 1, 1))
    times = [49, 39, 29, 19, 9, -1]
    draws = [noise() for _ in times]
    by_hand = ddpm_sample(pipeline.models.denoiser, x_t, times, step_noise=draws.__getitem__)
    assert_close(row, by_hand, rtol=1e-3, atol=1e-3)


def test_variations_differ_more_the_deeper_they_come_from():
    """The network is the ideal one for pixels from N(0, 0.5^2), so it returns draws of these."""
    pipeline = pipeline_of(white(0.5, NoiseScheduler(100)).network)
    x_0 = 0.5 * normal(1, 3, 16, 16).clamp(-1.9, 1.9)
    near, middle, far = (variations(pipeline, x_0, t, range(6)) for t in (4, 29, 99))
    assert (near - x_0).std() < (middle - x_0).std() < (far - x_0).std()
    # From pure noise nothing of the image is left: the variances of independent draws add up.
    assert_close((far - x_0).var(), x_0.var() + far.var(), rtol=0.1, atol=0)
    # A variation depends on its number alone.
    assert_close(variations(pipeline, x_0, 99, [4, 1]), far[[4, 1]])


def test_the_script_varies_a_file_and_overwrites_no_other_picture(tiny_run, tmp_path, saved):
    """The file's name is the index of the image of the seed."""
    saved.side_effect = lambda columns, path, rows: path.touch()
    file = tmp_path / "3.png"
    Image.new("RGB", (20, 20), (200, 0, 0)).save(file)
    flags = ["--depths 0 --steps 2 --out", tmp_path]
    for source in (3, file, file):
        call(edit, "vary", source, tiny_run, *flags)
    names = {path.stem for path in tmp_path.glob("v*")}
    assert names == {"variations-3", "variations-3-2", "variations-3-3"}
