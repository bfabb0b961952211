"""Interpolation and variations: exact at their ends, and as files by the script."""

from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

import edit
import sample
from functions.noise_scheduler import NoiseScheduler
from functions.samplers import ddpm_sample
from functions.sampling import editing
from functions.sampling.interpolation import interpolate_images, slerp, variations
from functions.sampling.options import SamplerOptions
from functions.support.random_numbers import ImageNoise
from tests.conftest import call, image_sampler_of
from tests.functions.known_denoisers import Gaussian, double, ideal

# They give one end, a mixture, and the other end.
WEIGHTS = torch.tensor([0.0, 0.3, 1.0])


def test_slerp_keeps_the_distribution_of_noise():
    noise = ImageNoise(0, range(2), (3, 64, 64)).draw()
    first, second = noise
    between = slerp(first, second, torch.linspace(0, 1, 11))
    torch.testing.assert_close(between.std((1, 2, 3)), torch.ones(11), rtol=0.02, atol=0)
    torch.testing.assert_close(between[0], first)
    torch.testing.assert_close(between[-1], second)

    # Between a noise and itself there is nothing else.
    torch.testing.assert_close(slerp(first, first, WEIGHTS), first.expand(3, 3, 64, 64))


def test_between_two_images_the_ends_are_what_comes_back_of_each(network):
    """What comes back is computed by hand, from one end at a time.

    The end is noised with the shared noise, and sampled from there with the noise that follows it.
    """
    image_sampler = image_sampler_of(network, options=SamplerOptions(steps=10), seed=5)
    scheduler = image_sampler.scheduler
    ends = image_sampler.noise([0, 1]).draw().clamp(-1, 1)
    row = interpolate_images(image_sampler, ends, 49, WEIGHTS)
    for end, interpolated in zip(ends, row[[0, 2]], strict=True):
        noise = image_sampler.noise([0], "interpolation")
        x_t = scheduler.q_sample(end[None], torch.tensor([49]), noise.draw())
        times = [49, 39, 29, 19, 9, -1]
        draws = [noise.draw() for _ in times]
        by_hand = ddpm_sample(image_sampler.denoiser, x_t, times, step_noise=draws.__getitem__)
        torch.testing.assert_close(interpolated, by_hand[0], rtol=1e-3, atol=1e-3)


def test_variations_differ_more_the_deeper_they_come_from():
    """The network is the ideal one for pixels from N(0, 0.5^2), so it returns draws of these."""
    data = Gaussian(double(0.0), double(0.5))
    image_sampler = image_sampler_of(ideal(data, NoiseScheduler(100)).network)
    x_0 = 0.5 * torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(1)).clamp(-1.9, 1.9)
    times = [image_sampler.time_at(depth) for depth in (0.05, 0.15, 0.3, 1)]
    of_depths = [variations(image_sampler, x_0, t, range(6)) for t in times]
    spreads = [(images - x_0).std().item() for images in of_depths]
    assert spreads[:3] == sorted(spreads[:3])

    # From pure noise nothing of the image is left: the variances of independent draws add up.
    independent = (x_0.var() + of_depths[-1].var()).sqrt().item()
    assert spreads[-1] == pytest.approx(independent, rel=0.05)

    # A variation depends on its number alone.
    torch.testing.assert_close(variations(image_sampler, x_0, 99, [4, 1]), of_depths[-1][[4, 1]])


@pytest.fixture
def saved_figures(monkeypatch):
    """Return the stand-in for what draws figures, which keeps what it is called with."""
    save = Mock()
    monkeypatch.setattr(editing, "save_strip", save)
    return save


def test_the_script_interpolates_between_images_of_the_seed(tiny_run, tmp_path, saved_figures):
    """At the ends of each row stand the images of the seed.

    So do they as mixtures at depth 0, where nothing is noised.
    """
    call(sample.main, tiny_run, "--n", 4, "--steps", 5, "--individual", "--out", tmp_path)
    own = [np.asarray(Image.open(tmp_path / f"0000{i}.png")).astype(int) for i in range(4)]
    flags = "--steps 5 --batch-size 4 --depths 0,0.295,1 --out"
    call(edit.main, "interpolate", 1, 3, tiny_run, *flags.split(), tmp_path)
    columns, titles, path, rows = saved_figures.call_args.args
    assert path.name.startswith("interpolation-1-3-")
    assert titles == ["A", *(f"{i / 8:.3g}" for i in range(9)), "B"]
    # The sampler's 5 steps visit 0, 20, 40, 60, 80 and 100.
    assert rows == ["t = 0", "t = 20", "t = 100"]
    for column, row, i in ((0, 0, 1), (1, 0, 1), (9, 0, 3), (10, 0, 3), (0, 1, 1), (0, 2, 1)):
        assert abs(columns[column][row] - own[i]).max() <= 1


def test_the_script_varies_files_and_overwrites_no_picture_of_others(
    tiny_run, tmp_path, saved_figures
):
    """Here are two files of one name, and the image of the seed with that for its index."""
    sources = [3]
    for level in (200, 100):
        folder = tmp_path / str(level)
        folder.mkdir()
        sources.append(folder / "3.png")
        Image.new("RGB", (20, 20), (level, 0, 0)).save(sources[-1])
    flags = ["--fit", "--depths", 0, "--steps", 2, "--out", tmp_path]
    for source in [3, *sources]:
        call(edit.main, "vary", source, tiny_run, *flags)
    assert len({call.args[2] for call in saved_figures.call_args_list}) == 3
    # At depth 0 the variations are the image itself.
    columns, *_ = saved_figures.call_args.args
    assert np.array_equal(columns[3], columns[0])


def test_exact_interpolation_says_by_how_much_it_misses(tiny_run, pictures, tmp_path, capsys):
    files = [pictures / "00000.png", pictures / "00001.png"]
    flags = ["--fit", "--steps", 4, "--exact", "--out", tmp_path]
    call(edit.main, "interpolate", *files, tiny_run, *flags)
    printed = capsys.readouterr().out
    assert printed.count("sampling again misses the image by ") == 2
    assert "(ddim, trailing, 4 steps, eta 0.0, x_0 not clipped)" in printed
    assert len([*tmp_path.glob("interpolation-exact-*.png")]) == 1
