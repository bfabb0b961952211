"""Details at twice the size: what an enlargement keeps, and what it draws."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from tqdm import tqdm

import sample
from data.datasets import load_images
from functions.enlarging import doubled, enlarging_times
from functions.noise_scheduler import NoiseScheduler
from functions.samplers import dpm_solver_sample
from functions.sampling.options import SamplerOptions
from functions.saved.checkpoint import load_weights
from functions.saved.run_folder import checkpoints_of
from functions.support.errors import UserError
from tests.conftest import call, image_sampler_of, train_tiny
from tests.functions.known_denoisers import Gaussian, ideal, mean_and_variance

FEW = ["--sampler", "dpm++", "--steps", 3, "--n", 3, "--device", "cpu"]


def test_means_stay_and_details_are_those_of_the_data():
    """The images are white Gaussian noise, whose details do not depend on their means.

    So each of the three free directions of a square is a Gaussian of its own, whose variance after
    the sampler's steps is known exactly.
    """
    std = 0.2
    scheduler = NoiseScheduler(1000, beta_schedule="cosine")
    denoiser = ideal(Gaussian(torch.zeros(768), torch.full((768,), std)), scheduler)
    sampler = replace(
        image_sampler_of(None, options=SamplerOptions("dpm++")), denoiser=denoiser, seed=3
    )
    small = 0.1 * torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    large = sampler.enlarge(small, range(64), tqdm(disable=True)).float()
    assert_close(F.avg_pool2d(large, 2), small, atol=1e-3, rtol=0)
    details = large - doubled(small)
    times = enlarging_times(scheduler)
    start = 0.0, 1 - scheduler.alpha_bar(times[0])
    one = ideal(Gaussian(torch.zeros(1), torch.full((1,), std)), scheduler)
    _, variance = mean_and_variance(one, dpm_solver_sample, times, start, eta=1)
    assert 0.8 * std < variance**0.5 < std
    assert details.square().mean().item() == pytest.approx(0.75 * variance, rel=0.03)
    right, down = details[..., 1:] * details[..., :-1], details[..., 1:, :] * details[..., :-1, :]
    # In a square details are correlated, because they add up to 0; over its edge they are not.
    for neighbours in (right, down.mT):
        inside, across = (neighbours[..., i::2].mean().item() / variance for i in (0, 1))
        assert inside == pytest.approx(-0.25, abs=0.02)
        assert across == pytest.approx(0, abs=0.02)


def test_it_begins_in_the_middle_and_ends_with_the_image():
    assert enlarging_times(NoiseScheduler(1000)) == [499, 428, 356, 285, 213, 142, 70, -1]
    few = NoiseScheduler(8, beta_schedule="cosine")
    assert enlarging_times(few) == [3, 2, 1, 0, -1]


def test_samples_keep_their_means_and_the_manifest_says_what_enlarged_them(
    tiny_run, pictures, tmp_path, capsys
):
    size = ("--model.image-size", 32, "--model.lowest-resolution-size", 16)
    large = train_tiny(pictures, tmp_path / "large", *size)
    plain, folder = tmp_path / "plain", tmp_path / "enlarged"
    call(sample.main, tiny_run, *FEW, "--individual", "--out", plain)
    enlarge = ("--enlarge", large)
    call(sample.main, tiny_run, *FEW, *enlarge, "--individual", "--out", folder)
    small = load_images(str(plain), 16).images.astype(float)
    squares = load_images(str(folder), 32).images.reshape(3, 16, 2, 16, 2, 3)
    # A clipped pixel changes a mean.
    free = ((squares > 0) & (squares < 255)).all((2, 4))
    assert free.sum() > 20
    assert abs(squares.mean((2, 4)) - small)[free].max() <= 1
    assert squares.std((2, 4)).mean() > 1

    digest = load_weights(checkpoints_of(large)[-1]).digest[:16]
    assert json.loads((folder / "samples.json").read_text())["enlarge"] == digest
    with pytest.raises(UserError, match="enlarge was None, is now"):
        call(sample.main, tiny_run, *FEW, *enlarge, "--individual", "--out", plain)
    # The bar counts all steps, and the folder's name has the model.
    capsys.readouterr()
    call(sample.main, tiny_run, *FEW, *enlarge)
    assert "30.0/30.0" in capsys.readouterr().err
    assert (next(tiny_run.glob(f"samples/*-{digest}-*")) / "grid.png").is_file()


def test_only_a_model_of_twice_the_size_enlarges(tiny_run):
    with pytest.raises(UserError, match=r"to enlarge those of \(3, 16, 16\), it must draw \(3, 32"):
        call(sample.main, tiny_run, *FEW, "--enlarge", tiny_run)
