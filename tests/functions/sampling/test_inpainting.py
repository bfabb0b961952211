"""Inpainting, beside the exact mean and covariance of its own chain for correlated Gaussian pixels."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from data.decode import read_image, read_with_mask
from functions.noise_scheduler import NoiseScheduler
from functions.prediction import Denoiser
from functions.sampling.generation import ImageSampler
from functions.sampling.inpainting import inpaint
from functions.sampling.options import SamplerOptions
from functions.support.errors import UserError
from functions.timesteps import sampling_times
from tests.conftest import CPU, call

SCHEDULER = NoiseScheduler(1000)
# Four pixels, each like its neighbours; the first two are kept
COVARIANCE = torch.tensor(
    [[0.9 ** abs(i - j) for j in range(4)] for i in range(4)], dtype=torch.float64
)
KEPT, ANEW = torch.tensor([1.5, 1.0]).double(), torch.tensor([[False, False], [True, True]])


def ideal_x_0(a):
    """E[x_0 | x_t] = M x_t for N(0, COVARIANCE): M (4, 4), at alpha_bar = a."""
    return a**0.5 * COVARIANCE @ torch.linalg.inv(a * COVARIANCE + (1 - a) * torch.eye(4).double())


class Ideal(torch.nn.Module):
    def forward(self, x_t, t):
        a = SCHEDULER.alphas_cumprod[t[0]].item()
        x_0 = (x_t.flatten(1).double() @ ideal_x_0(a).T).view_as(x_t)
        return ((x_t - a**0.5 * x_0) / (1 - a) ** 0.5).float()


def chain(steps, resample):
    """The new pixels' mean (2,) and covariance (2, 2): each operation is linear, with Gaussian noise."""
    mean, covariance, eye = torch.zeros(4).double(), torch.eye(4).double(), torch.eye(4).double()
    times = sampling_times(SCHEDULER, steps)
    for t, s in pairwise(times):
        a_t, a_s, beta = SCHEDULER.alpha_bar(t), SCHEDULER.alpha_bar(s), SCHEDULER.step_beta(t, s)
        # Eq. 7
        step = (
            a_s**0.5 * beta / (1 - a_t) * ideal_x_0(a_t)
            + (1 - beta) ** 0.5 * (1 - a_s) / (1 - a_t) * eye
        )
        for repeat in range(resample if s >= 0 else 1):
            if repeat:
                mean, covariance = (1 - beta) ** 0.5 * mean, (1 - beta) * covariance + beta * eye
            mean, covariance = (
                step @ mean,
                step @ covariance @ step.T + SCHEDULER.posterior_variance(t, s) * eye,
            )
            mean[:2], covariance[:2], covariance[:, :2] = a_s**0.5 * KEPT, 0.0, 0.0
            covariance[:2, :2] = (1 - a_s) * torch.eye(2)
    return mean[2:], covariance[2:, 2:]


def conditional():
    """The truth: mean and covariance of the new pixels given the kept ones."""
    gain = COVARIANCE[2:, :2] @ torch.linalg.inv(COVARIANCE[:2, :2])
    return gain @ KEPT, COVARIANCE[2:, 2:] - gain @ COVARIANCE[:2, 2:]


def sampler_of(*options, clip=False):
    denoiser = Denoiser(Ideal(), SCHEDULER)
    return ImageSampler(denoiser, SamplerOptions(*options, clip_x_0=clip), (1, 2, 2), 0, CPU)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "resample"), [(("ddpm", 10), 1), (("ddpm", 10), 4), (("ddim", 10), 4)]
)
def test_samples_have_the_mean_and_covariance_of_the_chain(options, resample):
    image_sampler, N = (
        sampler_of(*options, None, None, 1.0 if options[0] == "ddim" else None),
        20_000,
    )
    x_0 = torch.cat([KEPT, torch.zeros(2)]).float().view(1, 2, 2)
    answers = inpaint(image_sampler, x_0, ANEW, resample, range(N))
    assert torch.equal(answers[:, 0, 0], x_0[0, 0].expand(N, 2))
    found, (mean, covariance) = answers[:, 0, 1].double(), chain(10, resample)
    errors = (found.mean(dim=0) - mean) / (covariance.diagonal() / N).sqrt()
    assert errors.abs().max() < 4
    variances = covariance.diagonal()
    # Standard errors of covariances
    spread = ((variances[:, None] * variances + covariance**2) / N).sqrt()
    assert ((torch.cov(found.T) - covariance) / spread).abs().max() < 4


@pytest.mark.slow
def test_samples_approach_the_truth_as_steps_are_repeated():
    x_0, means = torch.cat([KEPT, torch.zeros(2)]).float().view(1, 2, 2), []
    for resample in (1, 5):
        answers = inpaint(sampler_of("ddpm", 50), x_0, ANEW, resample, range(2000))[
            :, 0, 1
        ].double()
        means.append((answers.mean(dim=0) - conditional()[0]).abs().max())
    assert means[1] < means[0] / 3


@pytest.mark.slow
def test_the_chain_approaches_the_truth_as_steps_are_repeated():
    """Up to what the steps lack: their variance is that of data of one point, which matters less the more there are."""

    def errors(steps, resample):
        found, truth = chain(steps, resample), conditional()
        return [(found[i] - truth[i]).abs().max().item() for i in range(2)]

    assert errors(50, 5)[0] < errors(50, 1)[0] / 5
    (mean_once, covariance_once), (mean, covariance) = errors(1000, 1), errors(1000, 10)
    assert mean < mean_once / 5 and covariance < covariance_once / 10


@pytest.mark.parametrize(
    "options", [("ddim",), ("ddim", 10, None, None, 0.5), ("dpm++",), ("ipndm",)]
)
def test_samplers_that_cannot_are_refused(options):
    with pytest.raises(UserError, match="lose their history"):
        inpaint(sampler_of(*options), torch.zeros(1, 2, 2), ANEW, 2, range(1))


@pytest.fixture
def photo(tmp_path):
    """A photo of 40 x 20 pixels, its mask, and the photo with that part erased."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 40, 3), np.uint8)
    mask = np.zeros((20, 40), np.uint8)
    mask[:, :14] = 255  # of which the crop leaves 4 columns of 20
    masks = {"mask": mask, "small": mask[:10], "empty": 0 * mask, "full": 0 * mask + 255}
    images = {
        "photo": pixels,
        "erased": np.dstack([pixels, 255 - mask]),
        "grey16": mask.astype(np.uint16),
    }
    for name, image in {**masks, **images}.items():
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    return tmp_path


@pytest.mark.parametrize("files", [("photo", "mask"), ("erased", None)])
def test_image_and_mask_are_cropped_and_resized_alike(files, photo):
    image, anew = read_with_mask(
        photo / f"{files[0]}.png", files[1] and photo / f"{files[1]}.png", 10
    )
    assert anew[:, :2].all() and not anew[:, 3:].any()
    whole = read_image(photo / "photo.png", 10, fit=True)
    # Beside them there is some white, by the resizing
    assert np.array_equal(image[:, 6:], whole[:, 6:])


@pytest.mark.parametrize(
    "flags, said",
    [
        (
            ["photo", "--mask", "small"],
            "has 40x10 pixels, its image 40x20; a mask must be as large as its image",
        ),
        (["photo", "--mask", "empty"], "nothing would be made anew"),
        (["photo", "--mask", "full"], "everything would be made anew"),
        (["photo"], "nothing would be made anew; name a --mask, or erase a part of the image"),
        (["grey16"], "nothing would be made anew"),
        (["nowhere"], "No such file"),
        (["photo", "--mask", "mask", "--sampler", "dpm++"], "lose their history"),
        (
            ["photo", "--mask", "mask", "--n", 101, "--individual"],
            "a grid shows 100 images at most",
        ),
        (["photo", "--mask", "mask", "--n", 5, "--resample", 3], None),
        (["erased", "--sampler", "ddim", "--eta", 1, "--n", 2, "--individual"], None),
    ],
)
def test_the_script_paints_or_says_why_not(flags, said, photo, tiny_run, tmp_path, capsys):
    names = {file.stem: file for file in photo.glob("*.png")} | {"nowhere": photo / "nowhere.png"}
    files = [names.get(flag, flag) for flag in flags]
    arguments = [tiny_run, "--steps", 4, "--out", tmp_path / "out", "--inpaint", *files]
    if said:
        with pytest.raises(UserError, match=said):
            call(sample.main, *arguments)
        assert not (tmp_path / "out").exists()
    else:
        call(sample.main, *arguments)
        assert (tmp_path / "out" / "inpainting.png").exists()
        if "--resample" in flags:
            assert "inpainting 5 times, 10 network calls each" in capsys.readouterr().out
        if "--individual" in flags:
            image, anew = read_with_mask(photo / "erased.png", None, 16)
            answers = [np.asarray(Image.open(tmp_path / "out" / f"0000{i}.png")) for i in range(2)]
            assert all(np.array_equal(answer[~anew], image[~anew]) for answer in answers)
            assert not np.array_equal(*answers)
