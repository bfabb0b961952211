"""Interpolation and variations: exact at their ends, and as files by the script."""

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from functions.noise_scheduler import NoiseScheduler
from functions.sampling import interpolation
from functions.sampling.generation import generate
from functions.sampling.interpolation import (
    interpolate_images,
    interpolate_seeds,
    slerp,
    variations,
)
from functions.sampling.options import SAMPLERS, SamplerOptions
from functions.support.pictures import save_strip
from functions.support.random_numbers import ImageNoise
from tests.conftest import call, image_sampler_of
from tests.functions.known_denoisers import Gaussian, double, ideal_model

WEIGHTS = torch.tensor([0.0, 0.3, 1.0])


@pytest.fixture
def image_sampler(network):
    return image_sampler_of(network, options=SamplerOptions(steps=10), seed=5)


def test_slerp_keeps_the_distribution_of_noise():
    noise = ImageNoise(0, range(2), (3, 64, 64)).draw()
    between = slerp(*noise, torch.linspace(0, 1, 11))
    torch.testing.assert_close(between.std((1, 2, 3)), torch.ones(11), rtol=0.02, atol=0)
    assert torch.equal(between[0], noise[0])
    torch.testing.assert_close(between[-1], noise[1])
    # Equal angles a step, as on a circle, but for the ends' slightly different lengths
    unit = torch.nn.functional.normalize(between.double().flatten(1))
    angles = torch.acos((unit[1:] * unit[:-1]).sum(1))
    torch.testing.assert_close(angles, angles.mean().expand(10), rtol=0.02, atol=0)
    torch.testing.assert_close(slerp(noise[0], noise[0], WEIGHTS), noise[0].expand(3, 3, 64, 64))


def test_noise_for_a_gpu_is_that_of_the_cpu(monkeypatch):
    """It is drawn by several threads; here it stays on the CPU."""
    on_cpu, empty = ImageNoise(0, range(40), (3, 8, 8)), torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory: empty(*shape))
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, non_blocking: tensor)
    for_gpu = ImageNoise(0, range(40), (3, 8, 8), "cuda")
    for _ in range(3):
        assert torch.equal(for_gpu.draw(), on_cpu.draw())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_between_two_seeds_the_ends_are_their_own_samples(network, sampler):
    image_sampler = image_sampler_of(network, options=SamplerOptions(sampler, 5))
    row = interpolate_seeds(image_sampler, (3, 8), WEIGHTS)
    torch.testing.assert_close(
        row[[0, 2]], generate(image_sampler, [3, 8], 2).images, rtol=1e-3, atol=2e-3
    )
    assert (row[1] - row[[0, 2]]).abs().mean((1, 2, 3)).min() > 0.01


def test_between_two_images_the_ends_are_what_comes_back_of_each(image_sampler):
    """By hand: the end noised with the shared noise, and sampled from there with the noise that follows it."""
    ends, scheduler = image_sampler.noise([0, 1]).draw().clamp(-1, 1), image_sampler.scheduler
    row = interpolate_images(image_sampler, ends, 49, WEIGHTS)
    for end, found in zip(ends, row[[0, 2]], strict=True):
        noise = image_sampler.noise([0], "interpolation")
        x_t = scheduler.q_sample(end[None], torch.tensor([49]), noise.draw())
        times, draw = [49, 39, 29, 19, 9, -1], lambda k, noise=noise: noise.draw()
        own = SAMPLERS["ddpm"](image_sampler.denoiser, scheduler, x_t, steps=times, step_noise=draw)
        torch.testing.assert_close(found, own[0], rtol=1e-3, atol=1e-3)


def test_a_variation_is_not_the_image_of_its_number(image_sampler):
    """The noise that image 2 of the seed was drawn from is not that of variation 2."""
    own = generate(image_sampler, [2], 1).images[0]
    assert (variations(image_sampler, own, 99, [2]) - own).abs().mean() > 0.01


def test_variations_differ_more_the_deeper_they_come_from():
    image_sampler = image_sampler_of(
        ideal_model(Gaussian(double(0.0), double(0.5)), NoiseScheduler(100))
    )
    x_0 = 0.5 * torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(1)).clamp(-1.9, 1.9)
    of_depths = [variations(image_sampler, x_0, t, range(6)) for t in (4, 14, 29, 99)]
    spreads = [(images - x_0).std().item() for images in of_depths]
    assert spreads[:3] == sorted(spreads[:3])
    # From pure noise nothing of the image is left: two independent draws of the data differ by 0.5 sqrt(2)
    assert spreads[-1] == pytest.approx(0.5 * 2**0.5, rel=0.07)
    torch.testing.assert_close(variations(image_sampler, x_0, 99, [4, 1]), of_depths[-1][[4, 1]])


@pytest.mark.slow
def test_the_script_interpolates_between_images_and_seeds(
    tiny_run, pictures, tmp_path, monkeypatch
):
    saved = {}

    def save(columns, titles, path, rows):
        saved[path.name] = columns, titles, rows
        save_strip(columns[:2], titles[:2], path, rows)  # few, for speed

    monkeypatch.setattr(interpolation, "save_strip", save)
    call(sample.main, tiny_run, "--n", 4, "--steps", 5, "--individual", "--out", tmp_path / "own")
    own = [np.asarray(Image.open(tmp_path / "own" / f"0000{i}.png")) for i in range(4)]
    call(
        sample.main,
        tiny_run,
        "--steps",
        5,
        "--interpolate",
        1,
        3,
        "--variations",
        2,
        "--batch-size",
        4,
        "--depths",
        "0,0.4,1",
        "--out",
        tmp_path / "a",
    )
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "interpolation.png",
        "variations.png",
    ]
    columns, titles, rows = saved["interpolation.png"]
    assert titles == [
        "image 1",
        "0",
        "0.125",
        "0.25",
        "0.375",
        "0.5",
        "0.625",
        "0.75",
        "0.875",
        "1",
        "image 3",
    ]
    assert rows == ["t = 0", "t = 40", "t = 100"]
    for row in (0, 2):  # the image itself, and the noise that it came from
        for column, i in ((0, 1), (1, 1), (9, 3), (10, 3)):
            assert abs(columns[column][row].astype(int) - own[i]).max() <= 1
    # The first, at depth 0
    assert abs(saved["variations.png"][0][1][0].astype(int) - own[2]).max() <= 1

    files = [pictures / "00000.png", pictures / "00001.png"]
    call(
        sample.main,
        tiny_run,
        "--steps",
        5,
        "--interpolate",
        *files,
        "--fit",
        "--variations",
        files[1],
        "--depths",
        "0,0.5",
        "--out",
        tmp_path / "b",
    )
    source = np.asarray(Image.open(files[1]).resize((16, 16), Image.Resampling.LANCZOS))
    for name, place in (("interpolation.png", 10), ("variations.png", 3)):
        assert np.array_equal(saved[name][0][place][0], source) and saved[name][2] == [
            "t = 0",
            "t = 50",
        ]
