"""Details at twice the size: what an enlargement keeps, and what it draws."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from tqdm import tqdm

import sample
from data.datasets import load_images
from functions.enlarging import Enlarger, doubled
from functions.noise_scheduler import NoiseScheduler
from functions.samplers import dpm_solver_sample
from functions.sampling.enlarger import enlarged
from functions.sampling.options import SamplerOptions
from functions.saved.checkpoint import load_weights
from functions.saved.run_folder import checkpoints_of
from functions.support.errors import UserError
from functions.support.random_numbers import ImageNoise
from tests.conftest import call, image_sampler_of, train_tiny
from tests.functions.known_denoisers import Gaussian, ideal, mean_and_variance

FEW = ["--sampler", "dpm++", "--steps", 3, "--n", 3, "--device", "cpu"]
COSINE = NoiseScheduler(1000, beta_schedule="cosine")
STD = 0.2
SMALL = 0.1 * torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def white(count):
    """Return the ideal denoiser of white noise, of whose `count` pixels none knows of another."""
    return ideal(Gaussian(torch.zeros(count), torch.full((count,), STD)), COSINE)


def test_means_stay_and_details_are_those_of_the_data():
    """Of white images each of the three free directions of a square is a Gaussian of its own.

    So its variance after these steps is known exactly.
    """
    states = []
    enlarger = Enlarger(white(768))
    noise = ImageNoise(3, range(64), (3, 16, 16))
    large = enlarger.enlarge(SMALL, noise.draw, lambda k, t, x, x_0: states.append(x)).float()
    assert_close(F.avg_pool2d(large, 2), SMALL, atol=1e-3, rtol=0)

    details = large - doubled(SMALL)
    times = enlarger.times
    start = 0.0, 1 - COSINE.alpha_bar(times[0])
    _, variance = mean_and_variance(white(1), dpm_solver_sample, times, start, eta=1)
    assert 0.7 * STD < variance**0.5 < 1.1 * STD
    assert details.square().mean().item() == pytest.approx(0.75 * variance, rel=0.02)
    right, down = details[..., 1:] * details[..., :-1], details[..., 1:, :] * details[..., :-1, :]
    # In a square details are correlated, because they add up to 0; over its edge they are not.
    for neighbours in (right, down.mT):
        inside, across = (neighbours[..., i::2].mean().item() / variance for i in (0, 1))
        assert inside == pytest.approx(-0.25, abs=0.02)
        assert across == pytest.approx(0, abs=0.02)

    # Each state has the means of the small image, which begins with noise.
    for t, x in zip(times[1:-1], states, strict=False):
        share = (F.avg_pool2d(x, 2) * SMALL).mean() / SMALL.square().mean()
        # The mean of four noises has a quarter of their variance.
        error = ((1 - COSINE.alpha_bar(t)) / 4 / SMALL.numel()) ** 0.5 / SMALL.std().item()
        assert share.item() == pytest.approx(COSINE.alpha_bar(t) ** 0.5, abs=4 * error)


def test_steps_begin_at_one_log_snr_whatever_the_schedule():
    def times(scheduler):
        return Enlarger(replace(white(1), scheduler=scheduler)).times

    for scheduler in (COSINE, NoiseScheduler(1000), NoiseScheduler(100)):
        distances = (torch.logit(scheduler.alphas_cumprod) + 1.41).abs()
        assert distances[times(scheduler)[0]] == distances.min()
    shifted = NoiseScheduler(1000, beta_schedule="cosine", log_snr_shift=-2 * math.log(2))
    assert times(shifted) == [499, 428, 356, 285, 213, 142, 70, -1]
    assert times(NoiseScheduler(4, beta_schedule="cosine")) == [2, 1, 0, -1]


def test_an_enlargement_depends_on_the_seed_and_the_index_alone(network):
    small = image_sampler_of(network, options=SamplerOptions("dpm++", 2), seed=7)
    small = replace(small, enlarger=Enlarger(white(3072)))
    together, alone, other = (
        sampler.sample(indices, tqdm(disable=True))
        for sampler, indices in ((small, [0, 1, 2]), (small, [2]), (replace(small, seed=8), [2]))
    )
    assert_close(together[2:], alone, atol=1e-3, rtol=0)
    first, second = (large - doubled(F.avg_pool2d(large, 2)) for large in (alone, other))
    assert (first - second).abs().mean() > 0.02


def test_samples_keep_their_means_and_the_manifest_says_what_enlarged_them(
    tiny_run, network, pictures, tmp_path, capsys
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
    sampler = replace(image_sampler_of(network), precision=torch.bfloat16)
    assert enlarged(sampler, large).enlarger.model.precision == torch.bfloat16
    # The bar counts all steps, and the folder's name has the model.
    capsys.readouterr()
    call(sample.main, tiny_run, *FEW, *enlarge)
    assert "30.0/30.0" in capsys.readouterr().err
    assert (next(tiny_run.glob(f"samples/*-{digest}-*")) / "grid.png").is_file()


def test_only_a_model_of_twice_the_size_enlarges(tiny_run):
    with pytest.raises(UserError, match=r"to enlarge these samples it must draw \(3, 32, 32"):
        call(sample.main, tiny_run, *FEW, "--enlarge", tiny_run)
