"""Inpainting, beside the exact mean and covariance of its own chain for correlated Gaussian pixels."""

import numpy as np
import pytest
import torch

from functions.noise_scheduler import NoiseScheduler
from functions.prediction import Denoiser
from functions.sampling.generation import ImageSampler
from functions.sampling.inpainting import inpaint
from functions.sampling.options import SamplerOptions
from functions.support.errors import UserError
from functions.timesteps import sampling_times
from tests.conftest import CPU

SCHEDULER = NoiseScheduler(1000)
# Four pixels, each like its neighbours; the first two are kept
COVARIANCE = torch.tensor([[0.9 ** abs(i - j) for j in range(4)] for i in range(4)], dtype=torch.float64)
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
    for t, s in zip(times, times[1:], strict=False):
        a_t, a_s, beta = SCHEDULER.alpha_bar(t), SCHEDULER.alpha_bar(s), SCHEDULER.step_beta(t, s)
        step = a_s**0.5 * beta / (1 - a_t) * ideal_x_0(a_t) + (1 - beta) ** 0.5 * (1 - a_s) / (1 - a_t) * eye  # Eq. 7
        for repeat in range(resample if s >= 0 else 1):
            if repeat:
                mean, covariance = (1 - beta) ** 0.5 * mean, (1 - beta) * covariance + beta * eye
            mean, covariance = step @ mean, step @ covariance @ step.T + SCHEDULER.posterior_variance(t, s) * eye
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


@pytest.mark.parametrize(("options", "resample"), [(("ddpm", 10), 1), (("ddpm", 10), 4), (("ddim", 10), 4)])
def test_samples_have_the_mean_and_covariance_of_the_chain(options, resample):
    image_sampler, N = sampler_of(*options, None, None, 1.0 if options[0] == "ddim" else None), 20_000
    x_0 = torch.cat([KEPT, torch.zeros(2)]).float().view(1, 2, 2)
    answers = inpaint(image_sampler, x_0, ANEW, resample, range(N))
    assert torch.equal(answers[:, 0, 0], x_0[0, 0].expand(N, 2))
    found, (mean, covariance) = answers[:, 0, 1].double(), chain(10, resample)
    errors = (found.mean(dim=0) - mean) / (covariance.diagonal() / N).sqrt()
    assert errors.abs().max() < 4
    variances = covariance.diagonal()
    spread = ((variances[:, None] * variances + covariance**2) / N).sqrt()  # standard errors of covariances
    assert ((torch.cov(found.T) - covariance) / spread).abs().max() < 4


def test_the_chain_approaches_the_truth_as_steps_are_repeated():
    mean, covariance = conditional()
    errors = [((found - truth).abs().max().item(), (spread - covariance).abs().max().item())
              for found, spread in (chain(50, resample) for resample in (1, 3, 10, 100)) for truth in [mean]]  # fmt: skip
    of_mean, of_covariance = np.array(errors).T
    assert (np.diff(of_mean) < 0).all() and (np.diff(of_covariance) < 0).all()
    assert of_mean[0] > 0.1 and of_mean[-1] < 0.02 and of_covariance[-1] < 0.02


@pytest.mark.parametrize("options", [("ddim",), ("dpm++",), ("ipndm",)])
def test_samplers_that_cannot_are_refused(options):
    with pytest.raises(UserError, match="lose their history"):
        inpaint(sampler_of(*options), torch.zeros(1, 2, 2), ANEW, 2, range(1))
