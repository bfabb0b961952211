"""Every sampler against the same one of diffusers, step for step on the same timesteps."""

from functools import cache

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, IPNDMScheduler
from torch.testing import assert_close

from functions.noise_scheduler import NoiseScheduler
from functions.samplers import ddim_sample, ddpm_sample, dpm_solver_sample, ipndm_sample
from functions.timesteps import sampling_times
from tests.functions.known_denoisers import part_of_the_way
from tests.functions.test_samplers import SHAPE, pure_noise


@cache
def alpha_bars(timesteps):
    """alpha_bar in float64, where diffusers has float32: without clipping x_0 is divided by as little as 0.006."""
    return torch.cumprod(
        1 - torch.linspace(0.1, 20, timesteps, dtype=torch.float64) / timesteps, dim=0
    )


def model_of(timesteps):
    """Says with some nonlinear function what x_0 is, up to 1.5: so states stay small, and clipping has work to do."""

    def model(x_t, t):
        a = alpha_bars(timesteps)[t].view(-1, 1, 1, 1)
        x_0 = 1.5 * torch.tanh(x_t + 0.3 * torch.sin(9 * a))
        return (x_t - a.sqrt() * x_0) / (1 - a).sqrt()

    return model


def theirs(kind, timesteps=1000, **options):
    scale = 1000 / timesteps
    scheduler = kind(
        timesteps, beta_start=1e-4 * scale, beta_end=0.02 * scale, beta_schedule="linear", **options
    )
    scheduler.alphas_cumprod = alpha_bars(timesteps)
    return scheduler


def their_states(scheduler, **options):
    """With step noise from the seed 2."""
    x, states, model = pure_noise(), [], model_of(scheduler.config.num_train_timesteps)
    generator = torch.Generator().manual_seed(2)
    for t in scheduler.timesteps:
        step = scheduler.step(model(x, t.expand(len(x))), t, x, generator=generator, **options)
        x = step.prev_sample
        states.append(x)
    if scheduler.config.get("variance_type") == "fixed_large":
        # They add noise to the finished image if the last t is not 0
        states[-1] = step.pred_original_sample
    return torch.stack(states)


def our_states(sampler, timesteps, *arguments, noise_dtype=torch.float64, **options):
    states, generator = [], torch.Generator().manual_seed(2)
    options["step_noise"] = lambda k: torch.randn(
        SHAPE, generator=generator, dtype=noise_dtype
    ).double()
    options["on_step"] = lambda k, t, x, x_0: states.append(x)
    x_0 = sampler(
        model_of(timesteps), NoiseScheduler(timesteps), pure_noise(), *arguments, **options
    )
    assert torch.equal(x_0, states[-1])
    return torch.stack(states)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize(
    ("timesteps", "steps", "spacing"),
    [(250, 250, "trailing"), (1000, 50, "trailing"), (1000, 12, "logsnr")],
)
def test_ddpm_agrees_with_diffusers_step_for_step(timesteps, steps, spacing, variance, clip):
    scheduler = theirs(
        DDPMScheduler, timesteps, variance_type=f"fixed_{variance}", clip_sample=clip
    )
    scheduler.set_timesteps(
        timesteps=sampling_times(NoiseScheduler(timesteps), steps, spacing)[:-1]
    )
    ours = our_states(ddpm_sample, timesteps, steps, variance, spacing, clip)
    assert_close(ours, their_states(scheduler), rtol=0, atol=1e-7)


# Numbers of steps that divide 1000: with others diffusers' own step width, 1000 // steps, leaves its own timesteps.
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(("steps", "eta"), [(200, 0.0), (50, 0.0), (50, 1.0), (8, 0.5), (1, 0.0)])
def test_ddim_agrees_with_diffusers_step_for_step(steps, eta, clip):
    scheduler = theirs(
        DDIMScheduler, clip_sample=clip, timestep_spacing="trailing", set_alpha_to_one=True
    )
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == sampling_times(NoiseScheduler(1000), steps)[:-1]
    ours = our_states(ddim_sample, 1000, steps, eta, clip_x_0=clip)
    assert_close(
        ours, their_states(scheduler, eta=eta, use_clipped_model_output=clip), rtol=0, atol=1e-7
    )


# Their `step` rounds the state to float32. Below 15 steps the last is of order 1 wherever it ends, `lower_order_final`.
@pytest.mark.parametrize("spacing", ["trailing", "logsnr"])
@pytest.mark.parametrize(
    ("steps", "stop"), [(1, -1), (2, -1), (10, -1), (40, -1), (10, 0), (40, 0)]
)
@pytest.mark.parametrize(
    ("algorithm", "order", "sampler", "eta"),
    [
        ("dpmsolver++", 1, ddim_sample, 0.0),
        ("dpmsolver++", 2, dpm_solver_sample, 0.0),
        ("sde-dpmsolver++", 2, dpm_solver_sample, 1.0),
    ],
)
def test_dpm_solver_agrees_with_diffusers_step_for_step(
    algorithm, order, sampler, eta, steps, stop, spacing
):
    options = {"solver_order": order, "final_sigmas_type": "zero" if stop == -1 else "sigma_min"}
    scheduler = theirs(DPMSolverMultistepScheduler, algorithm_type=algorithm, **options)
    times = sampling_times(NoiseScheduler(1000), steps, spacing)
    if stop == 0:
        times = part_of_the_way(NoiseScheduler(1000), steps, spacing, 999, 0)
    scheduler.set_timesteps(timesteps=times[:-1])
    ours = our_states(sampler, 1000, times, eta, clip_x_0=False, noise_dtype=torch.float32)
    assert_close(ours, their_states(scheduler).double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("spacing", ["trailing", "logsnr"])
@pytest.mark.parametrize("steps", [1, 3, 10, 40])
def test_ipndm_agrees_with_diffusers_step_for_step(steps, spacing):
    times = sampling_times(NoiseScheduler(1000), steps, spacing)
    alpha_bar = torch.cat([alpha_bars(1000), torch.ones(1, dtype=torch.float64)])[times]
    scheduler = IPNDMScheduler(trained_betas=alpha_bar.tolist())
    scheduler.set_timesteps(steps)
    # So they call alpha and sigma
    scheduler.alphas, scheduler.betas = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    scheduler.set_begin_index(0)
    x, expected, model = pure_noise(), [], model_of(1000)
    for k in range(steps):
        eps = model(x, torch.full((2,), times[k]))
        # What their model is taken to predict
        v = (eps - scheduler.betas[k] * x) / scheduler.alphas[k]
        x = scheduler.step(v, None, x).prev_sample
        expected.append(x)
    ours = our_states(ipndm_sample, 1000, steps, spacing, clip_x_0=False)
    assert_close(ours, torch.stack(expected), rtol=0, atol=1e-7)
