"""The forward process against closed forms in NumPy float64, diffusers, and the numbers of the paper's schedule."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch.testing import assert_close

from functions.noise_scheduler import NoiseScheduler

SCHEDULES = [(1000, True), (200, True), (200, False), (50, True)]


def numpy_schedule(timesteps, rescale):
    scale = 1000 / timesteps if rescale else 1.0
    betas = np.linspace(1e-4 * scale, 0.02 * scale, timesteps)
    return betas, np.cumprod(1 - betas)


@pytest.mark.parametrize(("timesteps", "rescale"), SCHEDULES)
def test_tables_match_numpy_float64(timesteps, rescale):
    betas, alpha_bar = numpy_schedule(timesteps, rescale)
    scheduler = NoiseScheduler(timesteps, rescale_betas=rescale)
    assert scheduler.betas.dtype == scheduler.alphas_cumprod.dtype == torch.float64
    assert_close(scheduler.betas.numpy(), betas, rtol=1e-12, atol=0)
    assert_close(scheduler.alphas_cumprod.numpy(), alpha_bar, rtol=1e-11, atol=0)


@pytest.mark.parametrize(("timesteps", "rescale"), SCHEDULES)
def test_forward_process_and_posterior_match_numpy(timesteps, rescale):
    betas, alpha_bar = numpy_schedule(timesteps, rescale)
    scheduler = NoiseScheduler(timesteps, rescale_betas=rescale)
    rng = np.random.default_rng(0)
    x_0, noise = rng.standard_normal((2, 6, 3, 4, 4))
    t = np.array([0, 1, timesteps // 3, timesteps // 2, timesteps - 2, timesteps - 1])
    a, b = alpha_bar[t][:, None, None, None], betas[t][:, None, None, None]
    previous = np.concatenate([[1.0], alpha_bar])[t][:, None, None, None]

    x_t = np.sqrt(a) * x_0 + np.sqrt(1 - a) * noise  # Eq. 4
    ours = scheduler.q_sample(torch.from_numpy(x_0), torch.from_numpy(t), torch.from_numpy(noise))
    assert_close(ours.numpy(), x_t, rtol=1e-10, atol=1e-12)

    mean, variance = scheduler.q_posterior(torch.from_numpy(x_0), ours, torch.from_numpy(t), torch.from_numpy(t) - 1)
    # q(x_{t-1} | x_t, x_0) from Bayes' rule on the two Gaussians, not from Eqs. 6-7: precisions add.
    inner = slice(1, None)  # t = 0 has no x_{t-1} but x_0 itself
    precision = (1 - b[inner]) / b[inner] + 1 / (1 - previous[inner])
    bayes_mean = (np.sqrt(1 - b) / b * x_t)[inner] + (np.sqrt(previous) * x_0)[inner] / (1 - previous[inner])
    assert_close(variance.numpy()[inner], 1 / precision, rtol=1e-9, atol=0)
    assert_close(mean.numpy()[inner], bayes_mean / precision, rtol=1e-9, atol=1e-9)
    assert_close(mean[0].numpy(), x_0[0], rtol=1e-10, atol=1e-10)
    assert variance[0].item() == 0


def test_an_int_t_is_a_batch_of_it():
    """As samplers have t, and as training has it: the same, but for float64 where the images are float32."""
    scheduler, generator = NoiseScheduler(1000), torch.Generator().manual_seed(0)
    x_0, x_t = torch.randn(2, 3, 3, 4, 4, generator=generator)
    for t, s in ((0, -1), (1, 0), (700, 20), (999, 998), (999, -1)):
        t_of_images, s_of_images = torch.full((3,), t), torch.full((3,), s)
        for method in (scheduler.q_sample, scheduler.predict_x_0, scheduler.predict_eps):
            assert_close(method(x_0, t, x_t), method(x_0, t_of_images, x_t))
        (mean, variance), (means, variances) = (
            scheduler.q_posterior(x_0, x_t, *times) for times in ((t, s), (t_of_images, s_of_images))
        )
        assert_close(mean, means)
        assert_close(torch.full((3, 1, 1, 1), variance), variances)


def test_a_long_step_s_posterior_is_bayes_rule():
    """From t = 700 to s = 20: the two Gaussians q(x_t | x_s) and q(x_s | x_0), whose precisions add."""
    scheduler = NoiseScheduler(1000)
    _, alpha_bar = numpy_schedule(1000, True)
    x_0, x_t, a, a_s = 0.3, -1.1, alpha_bar[700], alpha_bar[20]
    alpha = np.prod((1 - numpy_schedule(1000, True)[0])[21:701])
    precision = alpha / (1 - alpha) + 1 / (1 - a_s)
    bayes_mean = (np.sqrt(alpha) / (1 - alpha) * x_t + np.sqrt(a_s) / (1 - a_s) * x_0) / precision
    assert alpha == pytest.approx(a / a_s, rel=1e-9)
    mean, variance = scheduler.q_posterior(*torch.tensor([x_0, x_t], dtype=torch.float64), 700, 20)
    assert mean.item() == pytest.approx(bayes_mean, rel=1e-9)
    assert variance == pytest.approx(1 / precision, rel=1e-9)


def test_x_0_and_eps_are_recovered_from_x_t():
    scheduler = NoiseScheduler(1000)
    generator = torch.Generator().manual_seed(0)
    x_0, noise = torch.randn(2, 4, 3, 8, 8, generator=generator, dtype=torch.float64)
    t = torch.tensor([0, 10, 500, 999])
    x_t = scheduler.q_sample(x_0, t, noise)
    assert_close(scheduler.predict_x_0(x_t, t, noise), x_0)
    assert_close(scheduler.predict_eps(x_t, t, x_0), noise)


def test_agrees_with_diffusers():
    ours, theirs = NoiseScheduler(1000), DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    assert_close(ours.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=1e-4, atol=1e-7)
    x_0, noise, t = torch.randn(5, 3, 8, 8), torch.randn(5, 3, 8, 8), torch.tensor([0, 1, 100, 700, 999])
    assert_close(ours.q_sample(x_0, t, noise), theirs.add_noise(x_0, noise, t), rtol=1e-4, atol=1e-5)


def test_noising_step_by_step_gives_the_closed_form():
    """1000 single steps x_t = sqrt(1 - beta) x + sqrt(beta) z have, in distribution, the mean and variance of Eq. 4."""
    scheduler = NoiseScheduler(100)
    x = torch.full((200_000,), 0.7, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for beta in scheduler.betas[:60]:
        x = (1 - beta).sqrt() * x + beta.sqrt() * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    alpha_bar = scheduler.alphas_cumprod[59]
    standard_error = ((1 - alpha_bar) / len(x)).sqrt()
    assert abs(x.mean() - alpha_bar.sqrt() * 0.7) < 4 * standard_error
    assert abs(x.var() - (1 - alpha_bar)) < 4 * (1 - alpha_bar) * (2 / len(x)) ** 0.5


@pytest.mark.parametrize(
    ("timesteps", "rescale", "signal", "snr"), [(1000, True, 0.0064, 4.0e-5), (200, False, 0.364, 0.152)]
)
def test_terminal_signal_is_what_is_known_of_these_schedules(timesteps, rescale, signal, snr):
    scheduler = NoiseScheduler(timesteps, rescale_betas=rescale)
    assert scheduler.alphas_cumprod[-1].sqrt().item() == pytest.approx(signal, rel=0.01)
    assert scheduler.terminal_snr == pytest.approx(snr, rel=0.02)


def test_rescaling_ends_at_nearly_the_same_noise_for_any_number_of_steps():
    snrs = [NoiseScheduler(timesteps).terminal_snr for timesteps in (100, 200, 500, 1000, 4000)]
    assert max(snrs) < 1e-4


def test_float32_images_stay_float32():
    scheduler = NoiseScheduler(10, rescale_betas=False)
    x_0 = torch.randn(2, 3, 4, 4)
    assert scheduler.q_sample(x_0, torch.tensor([0, 9]), x_0).dtype == torch.float32


@pytest.mark.parametrize(
    "arguments",
    [{"timesteps": 1}, {"timesteps": 20}, {"timesteps": 100, "beta_end": 0.5}, {"timesteps": 1000, "beta_start": 0.0},
     {"timesteps": 1000, "beta_start": 0.03}, {"timesteps": 1000, "beta_end": float("nan")}],
)  # fmt: skip
def test_impossible_schedules_are_refused(arguments):
    with pytest.raises(ValueError, match=r"timesteps is|betas from"):
        NoiseScheduler(**arguments)
