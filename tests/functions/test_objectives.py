"""Objective v beside eps: what converts into what, against NumPy, diffusers, and networks whose answer is known."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch.testing import assert_close

from functions.likelihood import terms_of
from functions.losses import denoising_loss, eps_errors
from functions.noise_scheduler import NoiseScheduler
from functions.prediction import Denoiser, predict
from functions.samplers import ddim_sample, ddpm_sample, dpm_solver_sample, ipndm_sample
from tests.functions.known_denoisers import IMAGES, ideal_model

SCHEDULERS = {name: NoiseScheduler(1000, beta_schedule=name) for name in ("linear", "cosine")}
T = torch.tensor([0, 1, 200, 700, 999])
both_schedules = pytest.mark.parametrize("schedule", SCHEDULERS)


def normal(seed, count=5):
    return torch.randn(
        count, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def ideal_v(scheduler):
    """The ideal denoiser of IMAGES, whose v is the rotation of x_t and the ideal eps: in closed form, E[v | x_t]."""
    mean, variance = (part.view(3, 8, 8) for part in (IMAGES.mean, IMAGES.std**2))

    def network(x_t, t):
        a = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
        # Cov(v, x_t) = sqrt(a (1 - a)) (1 - variance), Var x_t = a variance + 1 - a
        slope = (a * (1 - a)).sqrt() * (1 - variance) / (a * variance + 1 - a)
        return slope * (x_t - a.sqrt() * mean) - (1 - a).sqrt() * mean

    return network


@both_schedules
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        (ddpm_sample, {}),
        (ddim_sample, {}),
        (dpm_solver_sample, {"eta": 1.0}),
        (dpm_solver_sample, {}),
        (ipndm_sample, {}),
    ],
)
def test_ideal_networks_of_either_objective_give_the_same_samples(sampler, options, clip, schedule):
    """Up to 1e-6: the `Denoiser` rounds x_t and v to float32, by 6e-8 of up to 4, and x_0 and eps are rotations."""
    # iPNDM's first step multiplies the error of eps by sigma_T, 157 or 2e4; the later ones shrink it as much again
    scheduler, draws = SCHEDULERS[schedule], [normal(k) for k in range(26)]
    options = {**options, "clip_x_0": clip, "step_noise": draws.__getitem__}
    of_eps = sampler(ideal_model(IMAGES, scheduler), scheduler, draws[-1], 25, **options)
    of_v = sampler(
        Denoiser(ideal_v(scheduler), scheduler, objective="v"), scheduler, draws[-1], 25, **options
    )
    assert_close(of_v, of_eps, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("schedule", "lost"), [("linear", 5e-6), ("cosine", 2e-4)])
def test_v_keeps_the_digits_of_x_0_that_eps_would_lose(schedule, lost):
    """At T-1, against float64. By way of eps, x_0 is divided by sqrt(alpha_bar): 0.006, and 5e-5."""
    scheduler, x_0, noise = SCHEDULERS[schedule], normal(1, 100), normal(2, 100)
    a = scheduler.alphas_cumprod[-1]
    x_t = (a.sqrt() * x_0 + (1 - a).sqrt() * noise).float()
    v = (a.sqrt() * noise - (1 - a).sqrt() * x_0).float()
    found, eps = predict(Denoiser(lambda x_t, t: v, scheduler, objective="v"), scheduler, x_t, 999)
    assert found.dtype == eps.dtype == torch.float32
    error = lambda guess, truth: ((guess - truth).square().mean() / truth.square().mean()).sqrt()
    assert max(error(found, x_0), error(eps, noise)) < 1e-7
    assert error(scheduler.predict_x_0(x_t, 999, eps), x_0) > lost


@both_schedules
@pytest.mark.parametrize("objective", ["eps", "v"])
def test_losses_convert_as_the_papers_say(objective, schedule):
    """Salimans and Ho: that of v is eps's over alpha_bar, and x_0's over 1 - alpha_bar. Of any network; in NumPy."""
    scheduler, x_0, noise = SCHEDULERS[schedule], normal(1).float(), normal(2).float()
    network = lambda x_t, t: torch.tanh(2 * x_t.float() + t.view(-1, 1, 1, 1) / 500)
    denoiser = Denoiser(network, scheduler, objective=objective)
    losses = denoising_loss(denoiser, scheduler, x_0, T, noise)
    a, mean = (
        scheduler.alphas_cumprod[T].view(-1, 1, 1, 1).numpy(),
        lambda error: (error**2).mean(axis=(1, 2, 3)),
    )
    x_t = np.sqrt(a) * x_0.numpy() + np.sqrt(1 - a) * noise.numpy()
    said = network(torch.from_numpy(x_t), T).double().numpy()
    eps, guess = said, (x_t - np.sqrt(1 - a) * said) / np.sqrt(a)  # Eq. 15
    if objective == "v":
        guess = np.sqrt(a) * x_t - np.sqrt(1 - a) * said
        eps = (x_t - np.sqrt(a) * guess) / np.sqrt(1 - a)
    of_eps, of_x_0 = mean(eps - noise.numpy()), mean(guess - x_0.numpy())
    a = a.reshape(-1)
    for expected in (of_eps / a, of_x_0 / (1 - a)):
        np.testing.assert_allclose(losses, expected * (1 if objective == "v" else a), rtol=1e-5)
    np.testing.assert_allclose(eps_errors(denoiser, scheduler, losses, T), of_eps, rtol=1e-5)


@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize(
    ("schedule", "theirs"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")]
)
def test_v_is_that_of_diffusers(kind, schedule, theirs):
    """Their `get_velocity`, what `step` takes for x_0, and where a step of DDIM leads."""
    ours, theirs = (
        SCHEDULERS[schedule],
        kind(1000, 1e-4, 0.02, theirs, prediction_type="v_prediction"),
    )
    theirs.alphas_cumprod = ours.alphas_cumprod  # float64
    theirs.set_timesteps(20)
    x_0, noise, said = normal(1).clamp(-1, 1), normal(2), normal(3).float()
    assert_close(ours.v(x_0, T, noise), theirs.get_velocity(x_0, noise, T))
    denoiser = Denoiser(lambda x_t, t: said, ours, objective="v")
    for t in (950, 500, 50):
        x_t = ours.q_sample(x_0, t, noise)
        for clip in (True, False):
            theirs.register_to_config(clip_sample=clip)
            step = theirs.step(said.double(), t, x_t)
            found, _ = predict(denoiser, ours, x_t, t, clip)
            assert_close(found, step.pred_original_sample)
        if kind is DDIMScheduler:
            assert_close(
                ddim_sample(denoiser, ours, x_t, [t, t - 50], clip_x_0=False), step.prev_sample
            )


@both_schedules
def test_the_bound_is_the_same_for_either_objective(schedule):
    """Up to the rounding to float32, of which eps makes an error of 1e-3 in x_0 at T-1, where there are no bits."""
    scheduler = SCHEDULERS[schedule]
    x_0, noise = (
        IMAGES.sample(5, torch.Generator().manual_seed(0)).view(5, 3, 8, 8).clamp(-1, 1),
        normal(2),
    )
    models = ideal_model(IMAGES, scheduler), Denoiser(ideal_v(scheduler), scheduler, objective="v")
    of_eps, of_v = (terms_of(model, scheduler, x_0, T, noise, "small", True) for model in models)
    assert_close(of_v[:2], of_eps[:2], rtol=1e-6, atol=1e-8)  # bits
    assert_close(of_v[2:], of_eps[2:], rtol=1e-6, atol=5e-5)  # squared errors
