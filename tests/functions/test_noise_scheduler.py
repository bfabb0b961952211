"""The forward process.

The truths are recursions and Bayes' rule in NumPy float64, diffusers' cosine schedule, and the
numbers that are known of the paper's schedule.
"""

import math
import re
from textwrap import dedent

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch.testing import assert_close

from config import EXPERIMENTS
from functions.noise_scheduler import BETA_SCHEDULES, NoiseScheduler, build_scheduler
from tests.conftest import ROOT, normal

schedules = pytest.mark.parametrize("timesteps, rescale", [(500, True), (200, False)])


def numpy_betas(timesteps, rescale):
    """Return the paper's betas: even from 1e-4 to 0.02, for 1000 steps."""
    scale = 1000 / timesteps if rescale else 1.0
    return np.linspace(1e-4 * scale, 0.02 * scale, timesteps)


@schedules
def test_noising_at_once_is_noising_step_by_step(timesteps, rescale):
    """The steps x_t = sqrt(1 - beta) x + sqrt(beta) z (Eq. 2) add up to what Eq. 4 does at once."""
    scheduler = NoiseScheduler(timesteps, rescale_betas=rescale)

    # The truth follows, step by step, how much is left of x_0 and how much noise there is. The
    # noises of two steps are independent, so their variances add.
    signal = 1.0
    variance = 0.0
    expected = []
    for beta in numpy_betas(timesteps, rescale):
        signal = np.sqrt(1 - beta) * signal
        variance = (1 - beta) * variance + beta
        expected.append((signal, np.sqrt(variance)))

    # The first pixel is all image and the second all noise, so x_t shows the two factors.
    x_0, noise = torch.eye(2, dtype=torch.float64).expand(timesteps, 2, 2).unbind(1)
    x_t = scheduler.q_sample(x_0, torch.arange(timesteps), noise)
    assert_close(x_t.numpy(), np.array(expected), rtol=1e-11, atol=0)


@schedules
def test_the_posterior_is_bayes_rule(timesteps, rescale):
    """The precisions of the Gaussians q(x_t | x_s) and q(x_s | x_0) add, for a step or for several.

    So the truth is Bayes' rule for Gaussians, and needs neither Eq. 6 nor Eq. 7. The mean is the
    average of what x_t and x_0 say of x_s, weighted by precisions.
    """
    scheduler = NoiseScheduler(timesteps, rescale_betas=rescale)
    alphas = 1 - numpy_betas(timesteps, rescale)
    x_0, x_t = normal(0, 2, 3, 4, 4, dtype=torch.float64)
    last = timesteps - 1

    for t, s in ((1, 0), (last, last - 1), (last, 50)):
        # q(x_t | x_s) has the alpha of all steps between, and q(x_s | x_0) that of all before.
        a = alphas[s + 1 : t + 1].prod()
        a_s = alphas[: s + 1].prod()
        precision = a / (1 - a) + 1 / (1 - a_s)
        of_x_t = np.sqrt(a) / (1 - a)
        of_x_0 = np.sqrt(a_s) / (1 - a_s)
        expected = (of_x_t * x_t + of_x_0 * x_0) / precision

        # Samplers have one timestep for all images, and training has one for each.
        for times in ((t, s), torch.tensor([[t], [s]])):
            mean, variance = scheduler.q_posterior(x_0, x_t, *times)
            assert_close(mean, expected, rtol=1e-9, atol=1e-9)
            assert float(variance) == pytest.approx(1 / precision, rel=1e-9)

    # A step to the clean image, s = -1, ends exactly there.
    mean, variance = scheduler.q_posterior(x_0, x_t, last, -1)
    assert_close(mean, x_0, rtol=1e-10, atol=1e-10)
    assert variance == 0


def test_the_sigmoid_betas_of_the_docs_take_beta_start_and_beta_end(monkeypatch):
    """The lines run as docs/extending.md prints them, as a row and nothing else."""
    text = (ROOT / "docs" / "extending.md").read_text()
    lines = re.search(r"^    (def sigmoid_betas.*?)^    # and", text, re.M | re.S)[1]
    exec(dedent("    " + lines), names := {"torch": torch, "Tensor": torch.Tensor})
    assert '    "sigmoid": sigmoid_betas,' in text
    monkeypatch.setitem(BETA_SCHEDULES, "sigmoid", names["sigmoid_betas"])
    changes = {"beta_schedule": "sigmoid", "beta_start": 3e-4, "beta_end": 0.03}
    config = EXPERIMENTS["faces"].override(**changes).diffusion
    betas = build_scheduler(vars(config)).betas.numpy()
    sigmoid = 1 / (1 + np.exp(-np.linspace(-6, 6, 1000)))
    assert np.allclose(betas, 3e-4 + (0.03 - 3e-4) * sigmoid, rtol=1e-12)
    with pytest.raises(ValueError, match="rescale_betas is False, and sigmoid betas do not"):
        build_scheduler(vars(config) | {"rescale_betas": False})


@pytest.mark.parametrize("timesteps", [2, 50, 5000])
def test_cosine_betas_are_those_of_diffusers(timesteps):
    """Theirs are float32: the ratio of neighbouring alpha_bar, near 1, is rounded by 6e-8."""
    ours = NoiseScheduler(timesteps, beta_schedule="cosine")
    theirs = DDPMScheduler(timesteps, beta_schedule="squaredcos_cap_v2")
    assert_close(ours.betas.float(), theirs.betas, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", BETA_SCHEDULES)
@pytest.mark.parametrize("own", [0, 2 * math.log(64 / 16)])
def test_a_shift_gives_a_shrunk_image_the_noise_of_a_small_one(name, own):
    """Averages of 2 x 2 pixels, 64 px of 128, have a quarter of the noise's variance."""
    plain = NoiseScheduler(1000, beta_schedule=name, log_snr_shift=own).alphas_cumprod
    shift = own + 2 * math.log(64 / 128)
    shifted = NoiseScheduler(1000, beta_schedule=name, log_snr_shift=shift)
    a = shifted.alphas_cumprod
    assert_close(a / (a + (1 - a) / 4), plain, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "timesteps, rescale, snr",
    [
        (1000, True, 4.0e-5),
        # Rescaling ends at nearly the same noise for any number of steps.
        (4000, True, 4.0e-5),
        # 200 steps of the same betas leave much of the image in x_T.
        (200, False, 0.152),
    ],
)
def test_terminal_signal_is_what_is_known_of_these_schedules(timesteps, rescale, snr):
    scheduler = NoiseScheduler(timesteps, rescale_betas=rescale)
    assert scheduler.terminal_snr == pytest.approx(snr, rel=0.07)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        # Rescaled to 20 steps, the last beta is 1.
        ({"timesteps": 20}, "0 < beta_start"),
        # The betas would fall.
        ({"timesteps": 1000, "beta_start": 0.03}, "0 < beta_start"),
        # No comparison with nan is true, so a check must not ask whether the betas are wrong.
        ({"timesteps": 1000, "beta_end": float("nan")}, "0 < beta_start"),
        # The product of the alphas is so small that it has few digits.
        ({"timesteps": 100_000, "rescale_betas": False}, "alpha_bar underflows"),
        ({"timesteps": 3, "betas": [0.1, 0.2]}, "2 betas; they must be 3, one for each"),
        ({"timesteps": 2, "betas": torch.tensor([0.1, 1.0])}, "timestep, and between 0 and 1"),
    ],
)
def test_impossible_schedules_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        NoiseScheduler(**arguments)
