"""Every sampler against the same one of diffusers, step for step on the same timesteps."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch.testing import assert_close

from functions.noise_scheduler import NoiseScheduler
from functions.samplers import ddim_sample, ddpm_sample, dpm_solver_sample
from functions.timesteps import sampling_times
from tests.functions.known_denoisers import exact, part_of_the_way
from tests.functions.test_samplers import SHAPE, pure_noise


def model_of(timesteps):
    """Return a model with some nonlinear idea of x_0, whose values go up to 1.5."""
    alpha_bar = NoiseScheduler(timesteps).alphas_cumprod

    def model(x_t, t):
        a = alpha_bar[t].view(-1, 1, 1, 1)
        # With bounded x_0 the states stay small, and beyond 1 clipping has work to do.
        x_0 = 1.5 * torch.tanh(x_t + 0.3 * torch.sin(9 * a))
        return (x_t - a.sqrt() * x_0) / (1 - a).sqrt()

    return model


def theirs(kind, timesteps=1000, **options):
    """Return a scheduler of diffusers with our alpha_bar, which is in float64."""
    scheduler = kind(timesteps, **options)
    scheduler.alphas_cumprod = NoiseScheduler(timesteps).alphas_cumprod
    return scheduler


def their_states(scheduler, **options):
    """Return the state after each step of diffusers, with step noise from the seed 2."""
    x = pure_noise()
    states = []
    model = model_of(scheduler.config.num_train_timesteps)
    generator = torch.Generator().manual_seed(2)
    for t in scheduler.timesteps:
        eps = model(x, t.expand(len(x)))
        step = scheduler.step(eps, t, x, generator=generator, **options)
        x = step.prev_sample
        states.append(x)

    # With the large variance they add noise to the finished image if the last t is not 0.
    if scheduler.config.get("variance_type") == "fixed_large":
        states[-1] = step.pred_original_sample
    return torch.stack(states)


def our_states(sampler, timesteps, *arguments, noise_dtype=torch.float64, **options):
    """Return the state after each step of our sampler, with step noise from the seed 2."""
    states = []
    generator = torch.Generator().manual_seed(2)

    def step_noise(k):
        return torch.randn(SHAPE, generator=generator, dtype=noise_dtype).double()

    x_0 = sampler(
        exact(model_of(timesteps), NoiseScheduler(timesteps)),
        pure_noise(),
        *arguments,
        step_noise=step_noise,
        on_step=lambda k, t, x, x_0: states.append(x),
        **options,
    )
    assert torch.equal(x_0, states[-1])
    return torch.stack(states)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize(
    "timesteps, steps, spacing",
    [
        # The first takes all steps, and the others skip most.
        (250, 250, "trailing"),
        (1000, 50, "trailing"),
        (1000, 12, "logsnr"),
    ],
)
def test_ddpm_agrees_with_diffusers_step_for_step(timesteps, steps, spacing, variance, clip):
    variance_type = f"fixed_{variance}"
    scheduler = theirs(DDPMScheduler, timesteps, variance_type=variance_type, clip_sample=clip)
    times = sampling_times(NoiseScheduler(timesteps), steps, spacing)
    # Their list ends with the last call, and ours with -1, the clean image.
    scheduler.set_timesteps(timesteps=times[:-1])

    ours = our_states(ddpm_sample, timesteps, steps, variance, spacing, clip)
    assert_close(ours, their_states(scheduler), rtol=0, atol=1e-7)


# These numbers of steps divide 1000. With others the step width of diffusers, 1000 // steps, does
# not lead to its own next timestep.
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(
    "steps, eta",
    [(200, 0.0), (50, 1.0), (8, 0.5), (1, 0.0)],
)
def test_ddim_agrees_with_diffusers_step_for_step(steps, eta, clip):
    scheduler = theirs(
        DDIMScheduler, clip_sample=clip, timestep_spacing="trailing", set_alpha_to_one=True
    )
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == sampling_times(NoiseScheduler(1000), steps)[:-1]

    # With clipping they recompute eps, as we do, only if they are told to.
    ours = our_states(ddim_sample, 1000, steps, eta, clip_x_0=clip)
    expected = their_states(scheduler, eta=eta, use_clipped_model_output=clip)
    assert_close(ours, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("spacing", ["trailing", "logsnr"])
@pytest.mark.parametrize(
    "steps, stop",
    [
        # The last step is of order 1 if it ends at the clean image.
        (1, -1),
        (2, -1),
        (10, -1),
        (40, -1),
        # With fewer than 15 steps it is of order 1 wherever it ends: `lower_order_final`.
        (10, 0),
        (40, 0),
    ],
)
@pytest.mark.parametrize("algorithm, eta", [("dpmsolver++", 0.0), ("sde-dpmsolver++", 1.0)])
def test_dpm_solver_agrees_with_diffusers_step_for_step(algorithm, eta, steps, stop, spacing):
    if stop == 0:
        times = part_of_the_way(NoiseScheduler(1000), steps, spacing, 999, 0)
        final_sigma = "sigma_min"
    else:
        times = sampling_times(NoiseScheduler(1000), steps, spacing)
        final_sigma = "zero"
    scheduler = theirs(
        DPMSolverMultistepScheduler,
        algorithm_type=algorithm,
        final_sigmas_type=final_sigma,
    )
    scheduler.set_timesteps(timesteps=times[:-1])

    options = {"clip_x_0": False, "noise_dtype": torch.float32}
    ours = our_states(dpm_solver_sample, 1000, times, eta, **options)
    # Their `step` rounds the state to float32.
    assert_close(ours, their_states(scheduler).double(), rtol=0, atol=1e-4)
