"""Denoisers: objective v beside eps, and one that a test registers, x_0.

The truths are the formulas of the papers, and diffusers.
"""

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn
from torch.testing import assert_close

from functions.denoiser import OBJECTIVES, Denoiser, Objective
from functions.losses import denoising_loss, eps_errors
from functions.noise_scheduler import BETA_SCHEDULES, NoiseScheduler
from functions.samplers import ddim_sample
from tests.conftest import normal, refused, small_unet
from tests.functions.known_denoisers import exact

SCHEDULERS = {name: NoiseScheduler(1000, beta_schedule=name) for name in BETA_SCHEDULES}
# The timesteps of a batch of five images include both ends.
T = torch.tensor([0, 1, 200, 700, 999])


# In the same x_t, the squared error of eps is that of x_0 times the SNR (Eq. 15).
X_0 = Objective(
    target=lambda scheduler, x_0, t, noise: x_0,
    from_output=lambda scheduler, x_t, t, x_0: (x_0, scheduler.predict_eps(x_t, t, x_0)),
    eps_factor=lambda scheduler, t: scheduler.alpha_bar(t) / (1 - scheduler.alpha_bar(t)),
    diffusers="sample",
)


@pytest.fixture(autouse=True)
def third_objective(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "x_0", X_0)


def test_an_unknown_objective_is_refused():
    with refused(r"it can be eps or v.* or x_0", ValueError):
        Denoiser(None, SCHEDULERS["linear"], objective="noise")


def images(seed):
    """Draw five standard normal images (5, 3, 8, 8) float64."""
    return normal(seed, 5, 3, 8, 8, dtype=torch.float64)


def test_v_keeps_the_digits_of_x_0_that_eps_would_lose():
    """The truth is the x_0 in float64 that x_t at T - 1 was made from.

    x_t and v are given in float32, as to any network. By way of eps, x_0 would be divided by
    sqrt(alpha_bar), which is 5e-5 here.
    """
    scheduler = SCHEDULERS["cosine"]
    truths = images(1), images(2)
    x_0, noise = truths
    v = scheduler.v(x_0, 999, noise).float()
    x_t = scheduler.q_sample(x_0, 999, noise).float()
    predicted = Denoiser(lambda x_t, t: v, scheduler, "v").predict(x_t, 999)
    for found, truth in zip(predicted, truths, strict=True):
        assert found.dtype == torch.float32
        assert (found - truth).norm() < 1e-7 * truth.norm()


@pytest.mark.parametrize("schedule", SCHEDULERS)
@pytest.mark.parametrize("objective", ["eps", "v", "x_0"])
def test_losses_are_squared_errors_of_the_target_and_convert_into_those_of_eps(objective, schedule):
    """The next test compares v and the predicted eps with those of diffusers."""
    scheduler = SCHEDULERS[schedule]
    x_0, noise, output = (images(seed) for seed in (1, 2, 3))
    denoiser = exact(lambda x_t, t: output, scheduler, objective)
    losses = denoising_loss(denoiser, x_0, T, noise)
    target = {"eps": noise, "v": scheduler.v(x_0, T, noise), "x_0": x_0}[objective]
    assert_close(losses, (output - target).square().mean((1, 2, 3)))

    _, eps = denoiser.predict(scheduler.q_sample(x_0, T, noise), T)
    assert_close(eps_errors(denoiser, losses, T), (eps - noise).square().mean((1, 2, 3)))


@pytest.mark.parametrize("objective", ["v", "x_0"])
@pytest.mark.parametrize(
    "schedule, theirs",
    [
        ("linear", "linear"),
        ("cosine", "squaredcos_cap_v2"),
    ],
)
def test_objectives_are_those_of_diffusers(schedule, theirs, objective):
    """Compare with their `get_velocity`, with the x_0 that `step` assumes, and with DDIM's step."""
    ours = SCHEDULERS[schedule]
    word = {"v": "v_prediction", "x_0": "sample"}[objective]
    theirs = DDIMScheduler(1000, beta_schedule=theirs, prediction_type=word)
    # Theirs would be in float32.
    theirs.alphas_cumprod = ours.alphas_cumprod
    theirs.set_timesteps(20)

    x_0 = images(1).clamp(-1, 1)
    noise = images(2)
    assert_close(ours.v(x_0, T, noise), theirs.get_velocity(x_0, noise, T))

    # Our network and theirs say the same, whatever it is.
    output = images(3)
    denoiser = exact(lambda x_t, t: output, ours, objective)
    for t in (950, 500, 50):
        x_t = ours.q_sample(x_0, t, noise)
        for clip in (True, False):
            theirs.register_to_config(clip_sample=clip)
            step = theirs.step(output, t, x_t)
            predicted, _ = denoiser.predict(x_t, t, clip)
            assert_close(predicted, step.pred_original_sample)

        # The last step was without clipping.
        x_s = ddim_sample(denoiser, x_t, [t, t - 50], clip_x_0=False)
        assert_close(x_s, step.prev_sample)


SCHEDULER = NoiseScheduler(1000)
X_T = normal(0, 2, 3, 16, 16)


@torch.no_grad()
def test_denoiser_gives_the_dtype_of_the_state():
    """The truth is the network itself, called without a `Denoiser`."""
    network = small_unet()
    t = torch.tensor([3, 700])
    expected = network(X_T, t)
    assert_close(Denoiser(network, SCHEDULER)(X_T, t), expected)

    half = Denoiser(network, SCHEDULER, precision=torch.bfloat16)(X_T.double(), t)
    assert half.dtype == torch.float64
    half = half.float()
    assert_close(half, expected, rtol=0.1, atol=0.1)
    # Were the two equal, then autocast would have done nothing.
    assert not torch.equal(half, expected)

    exact = network.double()(X_T.double(), t)
    double = Denoiser(network, SCHEDULER, precision=torch.float64)
    assert_close(double(X_T.double(), t), exact)
    assert_close(double(X_T, t), exact.float())


def test_denoiser_converts_inputs_that_are_no_integers():
    def network(x_t, t, label, brightness):
        return x_t * brightness * label

    denoiser = Denoiser(network, SCHEDULER)
    given = denoiser.given(label=torch.tensor(2), brightness=torch.tensor(0.1, dtype=torch.float64))
    assert torch.equal(given(X_T, T), X_T * 0.1 * 2)


@pytest.mark.parametrize("training", [True, False])
def test_evaluating_is_without_dropout_and_for_a_while(training):
    """The network is as it was after the context, even after one that an error ended."""
    denoiser = Denoiser(nn.Dropout(0.5).train(training), SCHEDULER)
    with pytest.raises(KeyError), denoiser.evaluating():
        assert not denoiser.network.training
        raise KeyError
    assert denoiser.network.training == training
