"""The forward process against closed forms in NumPy float64, diffusers, and the numbers of the paper's schedule."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch.testing import assert_close

from functions.noise_scheduler import NoiseScheduler

schedules = pytest.mark.parametrize(
    ("timesteps", "rescale"), [(1000, True), (200, True), (200, False), (50, True)]
)


def numpy_betas(timesteps, rescale):
    scale = 1000 / timesteps if rescale else 1.0
    return np.linspace(1e-4 * scale, 0.02 * scale, timesteps)


@schedules
def test_noising_at_once_is_noising_step_by_step(timesteps, rescale):
    """The steps x_t = sqrt(1 - beta) x + sqrt(beta) z (Eq. 2), in NumPy, add up to what Eq. 4 does at once."""
    scheduler = NoiseScheduler(timesteps, rescale_betas=rescale)
    signal, variance, expected = 1.0, 0.0, []
    for beta in numpy_betas(timesteps, rescale):
        signal, variance = np.sqrt(1 - beta) * signal, (1 - beta) * variance + beta
        expected.append((signal, np.sqrt(variance)))
    assert_close(scheduler.betas.numpy(), numpy_betas(timesteps, rescale), rtol=1e-12, atol=0)
    assert_close(
        scheduler.alphas_cumprod.numpy(), np.array(expected)[:, 0] ** 2, rtol=1e-11, atol=0
    )
    x_0, noise = (
        torch.tensor([1.0, 0.0], dtype=torch.float64),
        torch.tensor([0.0, 1.0], dtype=torch.float64),
    )
    ours = scheduler.q_sample(
        x_0.expand(timesteps, 2), torch.arange(timesteps), noise.expand(timesteps, 2)
    )
    assert_close(ours.numpy(), np.array(expected), rtol=1e-11, atol=0)
    assert (
        scheduler.q_sample(x_0[None].float(), torch.tensor([9]), noise[None].float()).dtype
        == torch.float32
    )


@schedules
def test_the_posterior_is_bayes_rule(timesteps, rescale):
    """Of a step or several: the precisions of the Gaussians q(x_t | x_s) and q(x_s | x_0) add; without Eqs. 6 and 7."""
    scheduler, alphas = (
        NoiseScheduler(timesteps, rescale_betas=rescale),
        1 - numpy_betas(timesteps, rescale),
    )
    x_0, x_t = np.random.default_rng(0).standard_normal((2, 3, 4, 4))
    images = torch.from_numpy(x_0), torch.from_numpy(x_t)
    half, last = timesteps // 2, timesteps - 1
    for t, s in ((1, 0), (half, half - 1), (last, last - 1), (half, 0), (last, half)):
        a, a_s = alphas[s + 1 : t + 1].prod(), alphas[: s + 1].prod()
        precision = a / (1 - a) + 1 / (1 - a_s)
        expected = (np.sqrt(a) / (1 - a) * x_t + np.sqrt(a_s) / (1 - a_s) * x_0) / precision
        mean, variance = scheduler.q_posterior(*images, t, s)
        assert_close(mean.numpy(), expected, rtol=1e-9, atol=1e-9)
        assert variance == pytest.approx(1 / precision, rel=1e-9)
    for t in (0, half):
        mean, variance = scheduler.q_posterior(*images, t, -1)
        assert_close(mean, images[0], rtol=1e-10, atol=1e-10)
        assert variance == 0


@pytest.mark.parametrize("timesteps", [2, 50, 1000, 5000])
def test_cosine_betas_are_those_of_the_paper_and_of_diffusers(timesteps):
    """Eq. 17 of Nichol and Dhariwal: alpha_bar_t = f(t) / f(0), which ends at 0. So the last beta is capped."""
    ours = NoiseScheduler(timesteps, beta_schedule="cosine")
    f = np.cos((np.arange(timesteps + 1) / timesteps + 0.008) / 1.008 * np.pi / 2) ** 2
    expected = f[1:] / f[0]
    expected[-1] = 0.001 * expected[-2]
    assert_close(ours.alphas_cumprod.numpy(), expected, rtol=1e-9, atol=0)
    assert (ours.betas[-1], ours.betas[:-1].max() < 0.999) == (0.999, True)
    theirs = DDPMScheduler(timesteps, beta_schedule="squaredcos_cap_v2")
    # Float32's 6e-8, of alpha_bar's ratio near 1
    assert_close(ours.betas.float(), theirs.betas, rtol=1e-6, atol=1e-8)
    assert_close(ours.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=1e-3, atol=1e-7)


def test_an_int_t_is_a_batch_of_it():
    """Samplers have one timestep for all images, training has one for each."""
    scheduler, generator = NoiseScheduler(1000), torch.Generator().manual_seed(0)
    x_0, x_t = torch.randn(2, 3, 3, 4, 4, generator=generator, dtype=torch.float64)
    for t, s in ((0, -1), (1, 0), (700, 20), (999, 998), (999, -1)):
        t_of_images, s_of_images = torch.full((3,), t), torch.full((3,), s)
        for method in (
            scheduler.q_sample,
            scheduler.predict_x_0,
            scheduler.predict_eps,
            scheduler.v,
        ):
            assert_close(method(x_0, t, x_t), method(x_0, t_of_images, x_t))
        mean, variance = scheduler.q_posterior(x_0, x_t, t, s)
        means, variances = scheduler.q_posterior(x_0, x_t, t_of_images, s_of_images)
        assert_close(mean, means)
        assert_close(torch.full((3, 1, 1, 1), variance, dtype=torch.float64), variances)


@pytest.mark.parametrize(
    "timesteps, rescale, signal, snr", [(1000, True, 0.0064, 4.0e-5), (200, False, 0.364, 0.152)]
)
def test_terminal_signal_is_what_is_known_of_these_schedules(timesteps, rescale, signal, snr):
    scheduler = NoiseScheduler(timesteps, rescale_betas=rescale)
    assert scheduler.alphas_cumprod[-1].sqrt().item() == pytest.approx(signal, rel=0.01)
    assert scheduler.terminal_snr == pytest.approx(snr, rel=0.02)


def test_rescaling_ends_at_nearly_the_same_noise_for_any_number_of_steps():
    assert (
        max(NoiseScheduler(timesteps).terminal_snr for timesteps in (100, 200, 500, 1000, 4000))
        < 1e-4
    )


@pytest.mark.parametrize(
    "arguments",
    [
        {"timesteps": 1},
        {"timesteps": 1, "beta_schedule": "cosine"},
        {"timesteps": 1000, "beta_schedule": "sigmoid"},
        {"timesteps": 20},
        {"timesteps": 1000, "beta_start": 0.0},
        {"timesteps": 1000, "beta_start": 0.03},
        {"timesteps": 1000, "beta_end": float("nan")},
    ],
)
def test_impossible_schedules_are_refused(arguments):
    with pytest.raises(ValueError, match=r"must be 2 or more, linear or cosine|betas from"):
        NoiseScheduler(**arguments)
