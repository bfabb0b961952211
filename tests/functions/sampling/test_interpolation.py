"""Interpolation and variations: exact at their ends, and as files by the script."""

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from functions.noise_scheduler import NoiseScheduler
from functions.samplers import SAMPLERS, ddpm_sample, dpm_solver_sample
from functions.sampling import interpolation
from functions.sampling.generation import generate
from functions.sampling.interpolation import (
    interpolate_images,
    interpolate_seeds,
    slerp,
    variations,
)
from functions.sampling.options import SamplerOptions
from functions.support.pictures import save_strip
from functions.support.random_numbers import ImageNoise
from tests.conftest import call, image_sampler_of
from tests.functions.known_denoisers import Gaussian, double, ideal_model, mean_and_variance

# They give one end, a mixture, and the other end.
WEIGHTS = torch.tensor([0.0, 0.3, 1.0])


@pytest.fixture
def image_sampler(network):
    return image_sampler_of(network, options=SamplerOptions(steps=10), seed=5)


def test_slerp_keeps_the_distribution_of_noise():
    noise = ImageNoise(0, range(2), (3, 64, 64)).draw()
    first, second = noise
    between = slerp(first, second, torch.linspace(0, 1, 11))
    torch.testing.assert_close(between.std((1, 2, 3)), torch.ones(11), rtol=0.02, atol=0)
    torch.testing.assert_close(between[0], first)
    torch.testing.assert_close(between[-1], second)

    # The angle is the same at each step, as on a circle, but for the ends' slightly different
    # lengths.
    unit = torch.nn.functional.normalize(between.double().flatten(1))
    angles = torch.acos((unit[1:] * unit[:-1]).sum(1))
    torch.testing.assert_close(angles, angles.mean().expand(10), rtol=0.02, atol=0)

    # Between a noise and itself there is nothing else.
    torch.testing.assert_close(slerp(first, first, WEIGHTS), first.expand(3, 3, 64, 64))


def test_noise_for_a_gpu_is_that_of_the_cpu(monkeypatch):
    """For a GPU several threads draw it. Here it then stays on the CPU."""
    on_cpu = ImageNoise(0, range(40), (3, 8, 8))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory: empty(*shape))
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, non_blocking: tensor)
    for_gpu = ImageNoise(0, range(40), (3, 8, 8), "cuda")
    for _ in range(3):
        assert torch.equal(for_gpu.draw(), on_cpu.draw())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_between_two_seeds_the_ends_are_their_own_samples(network, sampler):
    """Weights 0 and 1 give the images that the seed has under these numbers."""
    image_sampler = image_sampler_of(network, options=SamplerOptions(sampler, 5))
    row = interpolate_seeds(image_sampler, (3, 8), WEIGHTS)
    ends = row[[0, 2]]
    own = generate(image_sampler, [3, 8]).images
    torch.testing.assert_close(ends, own, rtol=1e-3, atol=2e-3)

    # The one between is another than each of them.
    assert (row[1] - ends).abs().mean((1, 2, 3)).min() > 0.01


def test_between_two_images_the_ends_are_what_comes_back_of_each(image_sampler):
    """What comes back is computed by hand, from one end at a time.

    The end is noised with the shared noise, and sampled from there with the noise that follows it.
    """
    scheduler = image_sampler.scheduler
    ends = image_sampler.noise([0, 1]).draw().clamp(-1, 1)
    row = interpolate_images(image_sampler, ends, 49, WEIGHTS)
    for end, interpolated in zip(ends, row[[0, 2]], strict=True):
        noise = image_sampler.noise([0], "interpolation")
        x_t = scheduler.q_sample(end[None], torch.tensor([49]), noise.draw())
        by_hand = ddpm_sample(
            image_sampler.denoiser,
            scheduler,
            x_t,
            steps=[49, 39, 29, 19, 9, -1],
            step_noise=lambda k, noise=noise: noise.draw(),
        )
        torch.testing.assert_close(interpolated, by_hand[0], rtol=1e-3, atol=1e-3)


def test_a_variation_is_not_the_image_of_its_number(image_sampler):
    """The noise that image 2 of the seed was drawn from is not that of variation 2."""
    own = generate(image_sampler, [2]).images[0]
    assert (variations(image_sampler, own, 99, [2]) - own).abs().mean() > 0.01


def test_variations_differ_more_the_deeper_they_come_from():
    """The network is the ideal one for pixels from N(0, 0.5^2), so it returns draws of these."""
    data = Gaussian(double(0.0), double(0.5))
    image_sampler = image_sampler_of(ideal_model(data, NoiseScheduler(100)))
    x_0 = 0.5 * torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(1)).clamp(-1.9, 1.9)
    of_depths = [variations(image_sampler, x_0, t, range(6)) for t in (4, 14, 29, 99)]
    spreads = [(images - x_0).std().item() for images in of_depths]
    assert spreads[:3] == sorted(spreads[:3])

    # From pure noise nothing of the image is left: the correlation has a standard error of
    # 1 / sqrt(n).
    n = of_depths[-1].numel()
    correlation = torch.corrcoef(torch.stack([of_depths[-1], x_0.expand(6, -1, -1, -1)]).flatten(1))
    assert abs(correlation[0, 1]) < 4 / n**0.5
    assert spreads[-1] > spreads[-2]

    # A variation depends on its number alone.
    torch.testing.assert_close(variations(image_sampler, x_0, 99, [4, 1]), of_depths[-1][[4, 1]])


@pytest.mark.parametrize("beta_schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [10, 20])
def test_variations_by_dpm_solver_are_too_different_at_no_depth(steps, beta_schedule):
    """The data are N(0, 0.5^2), and the network is the ideal one for them.

    The spread of the variations of x_0 = 0 is found without chance. The truth is that x_t with the
    variance 1 - a is followed by a draw from N(gain x_t, variance), the posterior.
    """
    data = Gaussian(double([0.0]), double([0.5]))
    scheduler = NoiseScheduler(1000, beta_schedule=beta_schedule)
    options = SamplerOptions("dpm++", steps)
    # From just above a timestep of the grid to it the first step would be tiny.
    above = [t + 1 for t in options.times(scheduler)[1:]]
    for start in [*above, *range(9, 1000, 10)]:
        a = scheduler.alpha_bar(start)
        _, found = mean_and_variance(
            data,
            dpm_solver_sample,
            scheduler,
            options.times(scheduler, start),
            (0.0, 1 - a),
            **options.arguments,
        )
        gain = a**0.5 * 0.5**2 / (a * 0.5**2 + 1 - a)
        variance = 0.5**2 * (1 - a) / (a * 0.5**2 + 1 - a)
        expected = gain**2 * (1 - a) + variance
        # So few steps are not exact. A tiny first one made the spread up to 13 times too large.
        assert 0.5 < (found / expected) ** 0.5 < 1.25


@pytest.fixture
def saved_strips(monkeypatch):
    """Return a dict that gets columns, titles and row titles of each figure, by its kind."""
    strips = {}

    def save(columns, titles, path, rows):
        strips[path.name.split("-")[0]] = (columns, titles, rows)

        # Few columns are drawn, for speed.
        save_strip(columns[:2], titles[:2], path, rows)

    monkeypatch.setattr(interpolation, "save_strip", save)
    return strips


@pytest.mark.slow
def test_the_script_interpolates_between_images_and_seeds(
    tiny_run, pictures, tmp_path, saved_strips
):
    """At the ends of each row stand the images of the seed, or those of the files."""
    call(sample.main, tiny_run, "--n", 4, "--steps", 5, "--individual", "--out", tmp_path / "own")
    own = [np.asarray(Image.open(tmp_path / "own" / f"0000{i}.png")) for i in range(4)]
    flags = "--steps 5 --interpolate 1 3 --variations 2 --batch-size 4 --depths 0,0.4,1"
    call(sample.main, tiny_run, *flags.split(), "--out", tmp_path / "a")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["interpolation-1-3.png", "variations-2.png"]
    columns, titles, rows = saved_strips["interpolation"]
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

    # The mixtures at the ends are the images themselves in two rows: at depth 0, where nothing is
    # noised, and at depth 1, where it is the noise of the seed that is mixed.
    for row in (0, 2):
        for column, i in ((0, 1), (1, 1), (9, 3), (10, 3)):
            assert abs(columns[column][row].astype(int) - own[i]).max() <= 1

    # The first variation at depth 0 is the image itself, too.
    columns, _, _ = saved_strips["variations"]
    assert abs(columns[1][0].astype(int) - own[2]).max() <= 1

    files = [pictures / "00000.png", pictures / "00001.png"]
    sources = ["--interpolate", *files, "--fit", "--variations", files[1]]
    flags = ["--steps", 5, "--depths", "0,0.5", "--out", tmp_path / "b"]
    call(sample.main, tiny_run, *sources, *flags)
    source = np.asarray(Image.open(files[1]).resize((16, 16), Image.Resampling.LANCZOS))
    for name, place in (("interpolation", 10), ("variations", 3)):
        columns, _, rows = saved_strips[name]
        assert np.array_equal(columns[place][0], source)
        assert rows == ["t = 0", "t = 50"]


def test_pictures_of_other_sources_are_not_overwritten(tiny_run, tmp_path, saved_strips):
    """Here are files of one name, an image with that for its number, and long names."""
    sources = [tmp_path / "a" / "3.png", tmp_path / "b" / "3.png", 3, tmp_path / f"{'x' * 240}.png"]
    for level, source in enumerate(sources):
        if source != 3:
            source.parent.mkdir(exist_ok=True)
            Image.new("L", (16, 16), level).save(source)

    out = tmp_path / "out"
    flags = ["--depths", "0", "--steps", 2, "--out", out]
    # The last request is the first one again.
    for source, expected in zip([*sources, sources[0]], (2, 4, 6, 8, 8), strict=True):
        before = {path: path.read_bytes() for path in out.glob("*")}
        call(sample.main, tiny_run, "--interpolate", source, source, "--variations", source, *flags)
        after = {path: path.read_bytes() for path in out.iterdir()}
        assert before.items() <= after.items()
        assert len(after) == expected
