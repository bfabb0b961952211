"""Interpolation and variations: exact at their ends, and as files by the script."""

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from functions.noise_scheduler import NoiseScheduler
from functions.prediction import Denoiser
from functions.sampling import interpolation
from functions.sampling.generation import ImageSampler, generate
from functions.sampling.interpolation import interpolate_images, interpolate_seeds, slerp, variations
from functions.sampling.options import SAMPLERS, SamplerOptions
from functions.support.errors import UserError
from functions.support.random_numbers import ImageNoise
from tests.conftest import call, small_unet

CPU = torch.device("cpu")
WEIGHTS = torch.tensor([0.0, 0.3, 1.0])


@pytest.fixture(scope="module")
def network():
    return small_unet()


def sampler_of(network, options=SamplerOptions(steps=10), seed=5):  # noqa: B008 (frozen)
    return ImageSampler(Denoiser(network, NoiseScheduler(100)), options, (3, 16, 16), seed, CPU)


def test_slerp_keeps_the_distribution_of_noise():
    noise = ImageNoise(0, range(2), (3, 64, 64)).draw()
    weights = torch.linspace(0, 1, 11)
    between = slerp(*noise, weights)
    torch.testing.assert_close(between.std((1, 2, 3)), torch.ones(11), rtol=0.02, atol=0)
    assert torch.equal(between[0], noise[0])
    torch.testing.assert_close(between[-1], noise[1])
    # Equal angles a step, as on a circle, but for the ends' slightly different lengths
    unit = between.double().flatten(1) / between.double().flatten(1).norm(dim=1, keepdim=True)
    angles = torch.acos((unit[1:] * unit[:-1]).sum(1))
    torch.testing.assert_close(angles, angles.mean().expand(10), rtol=0.02, atol=0)
    assert noise.mean(dim=0).std() < 0.75  # as the middle of a straight line does not
    torch.testing.assert_close(slerp(noise[0], noise[0], weights), noise[0].expand(11, 3, 64, 64))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_between_two_seeds_the_ends_are_their_own_samples(network, sampler):
    image_sampler = sampler_of(network, SamplerOptions(sampler, 10))
    row = interpolate_seeds(image_sampler, (3, 8), WEIGHTS)
    own = generate(image_sampler, [3, 8], 2)
    torch.testing.assert_close(row[[0, 2]], own.images, rtol=1e-3, atol=2e-3)
    assert (row[1] - row[0]).abs().mean() > 0.01
    assert (row[1] - row[2]).abs().mean() > 0.01


def test_between_two_images_the_ends_are_what_comes_back_of_each(network):
    """By hand: the end noised with the shared noise, and sampled from there with the noise that follows it."""
    image_sampler, ends = sampler_of(network), torch.rand(2, 3, 16, 16) * 2 - 1
    row = interpolate_images(image_sampler, ends, 49, WEIGHTS)
    for i, place in ((0, 0), (1, 2)):
        noise = image_sampler.noise([0], "interpolation")
        x_t = image_sampler.scheduler.q_sample(ends[i : i + 1], torch.tensor([49]), noise.draw())
        times = [49, 39, 29, 19, 9, -1]
        own = SAMPLERS["ddpm"](
            image_sampler.denoiser, image_sampler.scheduler, x_t, steps=times, step_noise=lambda k, n=noise: n.draw()
        )
        torch.testing.assert_close(row[place], own[0], rtol=1e-3, atol=1e-3)


def test_at_depth_0_nothing_happens_to_an_image(network):
    image_sampler, ends = sampler_of(network), torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(variations(image_sampler, ends[0], -1, range(3)), ends[0].expand(3, 3, 16, 16))
    torch.testing.assert_close(interpolate_images(image_sampler, ends, -1, WEIGHTS)[[0, 2]], ends)


def test_a_file_that_is_not_there_says_how_images_are_named(tiny_run, tmp_path):
    with pytest.raises(UserError, match=r"none\.png: No such file or directory; an image is named by"):
        call(sample.main, tiny_run, "--variations", tmp_path / "none.png", "--steps", 2, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_variation_is_not_the_image_of_its_number(network):
    """The noise that image 2 of the seed was drawn from is not that of variation 2."""
    image_sampler = sampler_of(network)
    own = image_sampler.decode(image_sampler.noise([2]).draw(), 99, image_sampler.noise([2]).draw)
    assert not torch.equal(image_sampler.noise([2]).draw(), image_sampler.noise([2], "variation").draw())
    assert (variations(image_sampler, own[0], 99, [2]) - own).abs().mean() > 0.01


def test_variations_differ_more_the_deeper_they_come_from():
    """With the exact denoiser of data from N(0, 0.5^2): x_0 = 0.25 / (0.25 + sigma^2) x_t / sqrt(alpha_bar)."""
    scheduler = NoiseScheduler(100)

    def exact(x_t, t):
        a = scheduler.alphas_cumprod[t].float().view(-1, 1, 1, 1)
        x_0 = 0.25 * a.sqrt() / (0.25 * a + 1 - a) * x_t
        return (x_t - a.sqrt() * x_0) / (1 - a).sqrt()

    image_sampler = ImageSampler(Denoiser(exact, scheduler), SamplerOptions(), (3, 16, 16), 0, CPU)
    x_0 = 0.5 * torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(1)).clamp(-1.9, 1.9)
    spreads = []
    for t in (4, 14, 29, 99):
        images = variations(image_sampler, x_0, t, range(6))
        spreads.append((images - x_0).std().item())
        assert (images[0] - images[1]).abs().mean() > 0.01
    assert spreads[:3] == sorted(spreads[:3])
    # From pure noise nothing of the image is left: two independent draws of the data differ by 0.5 sqrt(2)
    assert spreads[-1] == pytest.approx(0.5 * 2**0.5, rel=0.07)
    torch.testing.assert_close(
        variations(image_sampler, x_0, 49, [4, 1]), variations(image_sampler, x_0, 49, range(6))[[4, 1]]
    )


def test_the_script_interpolates_between_images_and_seeds(tiny_run, pictures, tmp_path, capsys, monkeypatch):
    saved = {}
    monkeypatch.setattr(interpolation, "save_strip", lambda columns, titles, path, rows: saved.update(
        {path.name: (columns, titles, rows)}))  # fmt: skip
    call(sample.main, tiny_run, "--n", 4, "--steps", 5, "--individual", "--out", tmp_path / "own")
    own = [np.asarray(Image.open(tmp_path / "own" / f"0000{i}.png")) for i in range(4)]
    call(sample.main, tiny_run, "--steps", 5, "--interpolate", 1, 3, "--batch-size", 4, "--depths", "0,0.4,1",
         "--out", tmp_path / "a")  # fmt: skip
    columns, titles, rows = saved["interpolation.png"]
    assert titles == ["image 1", "0", "0.125", "0.25", "0.375", "0.5", "0.625", "0.75", "0.875", "1", "image 3"]
    assert rows == ["t = 0", "t = 40", "t = 100"]
    for row in (0, 2):  # the image itself, and the noise that it came from
        for column, i in ((0, 1), (1, 1), (9, 3), (10, 3)):
            difference = columns[column][row].astype(int) - own[i]
            assert abs(difference).max() <= 1
    assert "5 steps" in capsys.readouterr().out

    files = [pictures / "00000.png", pictures / "00001.png"]
    call(sample.main, tiny_run, "--steps", 5, "--interpolate", *files, "--fit", "--variations", files[1], "--depths",
         "0,0.5", "--out", tmp_path / "b")  # fmt: skip
    for name, place in (("interpolation.png", 10), ("variations.png", 3)):
        columns, _, rows = saved[name]
        source = np.asarray(Image.open(files[1]).resize((16, 16), Image.Resampling.LANCZOS))
        assert np.array_equal(columns[place][0], source)
        assert rows == ["t = 0", "t = 50"]


def test_the_figures_are_written(tiny_run, tmp_path):
    call(sample.main, tiny_run, "--steps", 2, "--interpolate", 0, 1, "--variations", 2, "--out", tmp_path)
    assert Image.open(tmp_path / "interpolation.png").width > Image.open(tmp_path / "variations.png").width > 800
    assert sorted(path.name for path in tmp_path.iterdir()) == ["interpolation.png", "variations.png"]
