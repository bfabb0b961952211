"""Objective v beside eps, and one that a test registers, x_0: what converts into what.

The truths are the formulas of the papers in NumPy, diffusers, and ideal networks, whose answer is
known in closed form.
"""

from functools import partial

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from numpy.testing import assert_allclose
from torch.testing import assert_close

from functions.likelihood import bound_terms
from functions.losses import denoising_loss, eps_errors
from functions.noise_scheduler import NoiseScheduler
from functions.prediction import OBJECTIVES, Denoiser, Objective, predict
from functions.samplers import SAMPLERS, ddim_sample, dpm_solver_sample
from tests.functions.known_denoisers import IMAGES, ideal_model

SCHEDULERS = {name: NoiseScheduler(1000, beta_schedule=name) for name in ("linear", "cosine")}
# The timesteps of a batch of five images include both ends.
T = torch.tensor([0, 1, 200, 700, 999])
both_schedules = pytest.mark.parametrize("schedule", SCHEDULERS)
not_eps = pytest.mark.parametrize("objective", ["v", "x_0"])


def x_0_itself(scheduler, x_0, t, noise):
    return x_0


def predict_from_x_0(scheduler, x_t, t, x_0):
    return x_0, scheduler.predict_eps(x_t, t, x_0)


def snr(scheduler, t):
    """Return the squared error of eps over that of x_0, in the same x_t (Eq. 15)."""
    alpha_bar = scheduler.alpha_bar(t)
    return alpha_bar / (1 - alpha_bar)


X_0 = Objective(x_0_itself, predict_from_x_0, snr, "sample")


@pytest.fixture(autouse=True)
def third_objective(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "x_0", X_0)


@pytest.mark.parametrize("name", ["noise", None, [], 1], ids=repr)
def test_an_unknown_objective_is_refused(name):
    with pytest.raises(ValueError, match=r"it can be eps or v.* or x_0"):
        Denoiser(None, SCHEDULERS["linear"], objective=name)


def normal(seed, count=5):
    """Draw standard normal images (count, 3, 8, 8) float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 8, 8, generator=generator, dtype=torch.float64)


def ideal(objective, scheduler):
    """Return the ideal `Denoiser` for IMAGES, E[v | x_t] or E[x_0 | x_t], in closed form."""
    mean = IMAGES.mean.view(3, 8, 8)
    variance = (IMAGES.std**2).view(3, 8, 8)

    def network(x_t, t):
        # For Gaussian images both are linear in x_t, with the slope Cov(v, x_t) / Var(x_t) or
        # Cov(x_0, x_t) / Var(x_t), where Var(x_t) = a variance + 1 - a.
        a = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
        covariance = a.sqrt() * variance
        mean_of_output = mean
        if objective == "v":
            covariance = (a * (1 - a)).sqrt() * (1 - variance)
            mean_of_output = -(1 - a).sqrt() * mean
        slope = covariance / (a * variance + 1 - a)
        return slope * (x_t - a.sqrt() * mean) + mean_of_output

    return Denoiser(network, scheduler, objective=objective)


@both_schedules
@not_eps
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        (dpm_solver_sample, {"eta": 1.0}),
        *((row.function, {}) for row in SAMPLERS.values()),
    ],
)
def test_ideal_networks_of_all_objectives_give_the_same_samples(
    sampler, options, clip, objective, schedule
):
    """The ideal v and x_0 are linear in x_t and the ideal eps, so they lead along the same path."""
    scheduler = SCHEDULERS[schedule]
    # Of these draws the last is x_T, and draw k is the noise of step k.
    draws = [normal(k) for k in range(26)]

    def sampled(model):
        return sampler(
            model,
            scheduler,
            draws[-1],
            25,
            clip_x_0=clip,
            step_noise=draws.__getitem__,
            **options,
        )

    of_eps = sampled(ideal_model(IMAGES, scheduler))
    of_other = sampled(ideal(objective, scheduler))

    # The `Denoiser` rounds x_t and v, which are up to 4, to float32 and so by 6e-8 of that. x_0 and
    # eps are rotations of the two, which magnify nothing. iPNDM's first step multiplies the error
    # of eps by sigma_T, 157 or 2e4; the later ones shrink it as much again. From x_0, eps is
    # divided by sqrt(1 - alpha_bar), and multiplied by as much in the next state.
    assert_close(of_other, of_eps, rtol=0, atol=1e-6)


def relative_error(guess, truth):
    """Return the root of the mean squared error, over that of the truth itself."""
    return ((guess - truth).square().mean() / truth.square().mean()).sqrt()


@pytest.mark.parametrize(("schedule", "lost"), [("linear", 5e-6), ("cosine", 2e-4)])
def test_v_keeps_the_digits_of_x_0_that_eps_would_lose(schedule, lost):
    """The truth is the x_0 in float64 that x_t at T - 1 was made from.

    x_t and v are given in float32, as to any network.
    """
    scheduler = SCHEDULERS[schedule]
    x_0 = normal(1, 100)
    noise = normal(2, 100)
    a = scheduler.alphas_cumprod[-1]
    x_t = (a.sqrt() * x_0 + (1 - a).sqrt() * noise).float()
    v = (a.sqrt() * noise - (1 - a).sqrt() * x_0).float()

    denoiser = Denoiser(lambda x_t, t: v, scheduler, objective="v")
    predicted, eps = predict(denoiser, scheduler, x_t, 999)
    assert predicted.dtype == eps.dtype == torch.float32
    assert relative_error(predicted, x_0) < 1e-7
    assert relative_error(eps, noise) < 1e-7

    # By way of eps, x_0 is divided by sqrt(alpha_bar), which is 0.006 or 5e-5 here.
    by_way_of_eps = scheduler.predict_x_0(x_t, 999, eps)
    assert relative_error(by_way_of_eps, x_0) > lost


@both_schedules
@pytest.mark.parametrize("objective", ["eps", "v", "x_0"])
def test_losses_convert_as_the_papers_say(objective, schedule):
    """For any network the loss of v is that of eps over alpha_bar, and of x_0 over 1 - alpha_bar.

    So Salimans and Ho have it. The truth is in NumPy float64.
    """
    scheduler = SCHEDULERS[schedule]
    x_0 = normal(1).float()
    noise = normal(2).float()

    def network(x_t, t):
        return torch.tanh(2 * x_t.float() + t.view(-1, 1, 1, 1) / 500)

    denoiser = Denoiser(network, scheduler, objective=objective)
    losses = denoising_loss(denoiser, scheduler, x_0, T, noise)

    # The network's output means an eps and an x_0: by x_t = sqrt(a) x_0 + sqrt(1 - a) eps, and by
    # the definition of v.
    a = scheduler.alphas_cumprod[T].view(-1, 1, 1, 1).numpy()
    x_t = np.sqrt(a) * x_0.numpy() + np.sqrt(1 - a) * noise.numpy()
    output = network(torch.from_numpy(x_t), T).double().numpy()
    predicted = output
    if objective == "v":
        predicted = np.sqrt(a) * x_t - np.sqrt(1 - a) * output
    if objective == "eps":
        predicted = (x_t - np.sqrt(1 - a) * output) / np.sqrt(a)
    eps = (x_t - np.sqrt(a) * predicted) / np.sqrt(1 - a)

    of_eps = ((eps - noise.numpy()) ** 2).mean(axis=(1, 2, 3))
    of_x_0 = ((predicted - x_0.numpy()) ** 2).mean(axis=(1, 2, 3))
    a = a.reshape(-1)
    factor = {"eps": a, "v": 1, "x_0": 1 - a}[objective]
    # Both conversions give the loss of v. The loss of eps is alpha_bar times that, and the loss of
    # x_0 is 1 - alpha_bar times that.
    for of_v in (of_eps / a, of_x_0 / (1 - a)):
        assert_allclose(losses, of_v * factor, rtol=1e-5)
    assert_allclose(eps_errors(denoiser, scheduler, losses, T), of_eps, rtol=1e-5)


@not_eps
@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize(
    ("schedule", "theirs"),
    [
        ("linear", "linear"),
        ("cosine", "squaredcos_cap_v2"),
    ],
)
def test_objectives_are_those_of_diffusers(kind, schedule, theirs, objective):
    """Compare with their `get_velocity`, with the x_0 that `step` assumes, and with DDIM's step."""
    ours = SCHEDULERS[schedule]
    word = {"v": "v_prediction", "x_0": "sample"}[objective]
    theirs = kind(1000, 1e-4, 0.02, theirs, prediction_type=word)
    # Theirs would be in float32.
    theirs.alphas_cumprod = ours.alphas_cumprod
    theirs.set_timesteps(20)

    x_0 = normal(1).clamp(-1, 1)
    noise = normal(2)
    assert_close(ours.v(x_0, T, noise), theirs.get_velocity(x_0, noise, T))

    # Our network and theirs say the same, whatever it is; ours in float32.
    close = partial(assert_close, rtol=0, atol=1e-6, check_dtype=False)
    output = normal(3).float()
    denoiser = Denoiser(lambda x_t, t: output, ours, objective=objective)
    for t in (950, 500, 50):
        x_t = ours.q_sample(x_0, t, noise)
        for clip in (True, False):
            theirs.register_to_config(clip_sample=clip)
            step = theirs.step(output.double(), t, x_t)
            predicted, _ = predict(denoiser, ours, x_t, t, clip)
            close(predicted, step.pred_original_sample)

        # The last step was without clipping.
        if kind is DDIMScheduler:
            x_s = ddim_sample(denoiser, ours, x_t, [t, t - 50], clip_x_0=False)
            close(x_s, step.prev_sample)


@both_schedules
@not_eps
def test_the_bound_is_the_same_for_all_objectives(objective, schedule):
    """Ideal networks of all objectives know the same, so they need the same bits."""
    scheduler = SCHEDULERS[schedule]
    images = IMAGES.sample(5, torch.Generator().manual_seed(0))
    x_0 = images.view(5, 3, 8, 8).clamp(-1, 1)
    noise = normal(2)

    def terms(model):
        return bound_terms(model, scheduler, x_0, T, noise, "small", True)

    *bits, squared_errors = terms(ideal_model(IMAGES, scheduler))
    *bits_of_other, errors_of_other = terms(ideal(objective, scheduler))
    assert_close(bits_of_other, bits, rtol=1e-6, atol=1e-8)
    # At T - 1, where there are no bits, the rounding of eps to float32 is an error of 1e-3 in x_0.
    assert_close(errors_of_other, squared_errors, rtol=1e-6, atol=5e-5)
