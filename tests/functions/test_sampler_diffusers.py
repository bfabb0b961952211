"""Every sampler against the same one of diffusers, step for step on the same timesteps."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch.testing import assert_close

from functions.denoiser import OBJECTIVES
from functions.samplers import VARIANCES, ddim_sample, ddpm_sample, dpm_solver_sample
from functions.timesteps import sampling_times
from tests.functions.known_denoisers import exact
from tests.functions.test_samplers import SCHEDULER, X_T, smooth

THEIR_WORDS = {name: row.diffusers for name, row in OBJECTIVES.items() if row.diffusers}
each_objective = pytest.mark.parametrize("objective", THEIR_WORDS)
clip_or_not = pytest.mark.parametrize("clip", [True, False])


def theirs(kind, objective, **options):
    """Return a scheduler of diffusers with our alpha_bar, which is in float64."""
    word = THEIR_WORDS[objective]
    scheduler = kind(SCHEDULER.timesteps, prediction_type=word, **options)
    scheduler.alphas_cumprod = SCHEDULER.alphas_cumprod
    return scheduler


def their_states(scheduler, **options):
    """Return the state after each step of diffusers, with step noise from the seed 2."""
    x = X_T
    states = []
    generator = torch.Generator().manual_seed(2)
    for t in scheduler.timesteps:
        output = smooth(x, t.expand(len(x)))
        step = scheduler.step(output, t, x, generator=generator, **options)
        x = step.prev_sample
        states.append(x)

    # With the large variance they add noise to the finished image if the last t is not 0.
    if scheduler.config.get("variance_type") == "fixed_large":
        states[-1] = step.pred_original_sample
    return torch.stack(states)


def our_states(sampler, objective, times, *, noise_dtype=torch.float64, **options):
    """Return the state after each step of our sampler, with step noise from the seed 2."""
    states = []
    generator = torch.Generator().manual_seed(2)

    def step_noise(k):
        return torch.randn(X_T.shape, generator=generator, dtype=noise_dtype).double()

    x_0 = sampler(
        exact(smooth, SCHEDULER, objective),
        X_T,
        times,
        step_noise=step_noise,
        on_step=lambda k, t, x, x_0: states.append(x),
        **options,
    )
    assert torch.equal(x_0, states[-1])
    return torch.stack(states)


@clip_or_not
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("steps", [100, 12])
@each_objective
def test_ddpm_agrees_with_diffusers_step_for_step(objective, steps, variance, clip):
    variance_type = f"fixed_{variance}"
    scheduler = theirs(DDPMScheduler, objective, variance_type=variance_type, clip_sample=clip)
    times = sampling_times(SCHEDULER, steps)
    # Their list ends with the last call, and ours with -1, the clean image.
    scheduler.set_timesteps(timesteps=times[:-1])

    ours = our_states(ddpm_sample, objective, times, variance=variance, clip_x_0=clip)
    assert_close(ours, their_states(scheduler), rtol=0, atol=1e-7)


# These numbers of steps divide 100. With others the step width of diffusers, 100 // steps, does not
# lead to its own next timestep.
@clip_or_not
@pytest.mark.parametrize("steps, eta", [(50, 0.0), (20, 1.0), (4, 0.5), (1, 0.0)])
@each_objective
def test_ddim_agrees_with_diffusers_step_for_step(objective, steps, eta, clip):
    options = {"timestep_spacing": "trailing", "set_alpha_to_one": True}
    scheduler = theirs(DDIMScheduler, objective, clip_sample=clip, **options)
    scheduler.set_timesteps(steps)
    times = sampling_times(SCHEDULER, steps)
    assert scheduler.timesteps.tolist() == times[:-1]

    # With clipping they recompute eps, as we do, only if they are told to.
    ours = our_states(ddim_sample, objective, times, eta=eta, clip_x_0=clip)
    expected = their_states(scheduler, eta=eta, use_clipped_model_output=clip)
    assert_close(ours, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "steps, spacing",
    [
        # The last step is of order 1 if it ends at the clean image.
        (1, "trailing"),
        (2, "trailing"),
        (40, "trailing"),
        # Without the step from t = 0: with fewer than 15 steps the last one is of order 1 wherever
        # it ends (`lower_order_final`).
        (15, "logsnr"),
        (16, "logsnr"),
    ],
)
@pytest.mark.parametrize("algorithm, eta", [("dpmsolver++", 0.0), ("sde-dpmsolver++", 1.0)])
def test_dpm_solver_agrees_with_diffusers_step_for_step(algorithm, eta, steps, spacing):
    """By way of v, x_0 is small enough for the float32 to which they round states."""
    times = sampling_times(SCHEDULER, steps, spacing)
    last = "zero"
    if spacing == "logsnr":
        times.pop()
        last = "sigma_min"
    options = {"algorithm_type": algorithm, "final_sigmas_type": last}
    scheduler = theirs(DPMSolverMultistepScheduler, "v", **options)
    scheduler.set_timesteps(timesteps=times[:-1])

    options = {"eta": eta, "clip_x_0": False, "noise_dtype": torch.float32}
    ours = our_states(dpm_solver_sample, "v", times, **options)
    assert_close(ours, their_states(scheduler).double(), rtol=0, atol=1e-4)
