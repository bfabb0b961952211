"""DDIM inversion, on a Gaussian, for which the way from an image to its noise is known."""

import pytest
import torch

from functions.denoiser import Denoiser
from functions.noise_scheduler import NoiseScheduler
from functions.samplers import ddim_invert, ddim_sample
from tests.functions.known_denoisers import IMAGES, double, ideal, sigmas


@pytest.mark.parametrize("beta_schedule", ["linear", "cosine"])
def test_inversion_and_the_way_back_have_order_1(beta_schedule):
    """Twice as many steps halve the errors, of x_T and of the image that is sampled from it."""
    # So many timesteps are needed that the spacing of the steps is not rounded much.
    scheduler = NoiseScheduler(4000, beta_schedule=beta_schedule)
    denoiser = ideal(IMAGES, scheduler)
    x_0 = IMAGES.sample(8, torch.Generator().manual_seed(0)).view(8, 3, 8, 8)
    # The path is that from sigma = 0, the clean image, to the last timestep.
    a = scheduler.alphas_cumprod[-1].double()
    path = IMAGES.path(x_0.flatten(1), double(0.0), sigmas(a))
    truth = a.sqrt() * path.view(x_0.shape)

    errors = []
    for steps in (50, 100, 200, 400):
        x_T = ddim_invert(denoiser, x_0, steps, "logsnr")
        again = ddim_sample(denoiser, x_T, steps, spacing="logsnr", clip_x_0=False)
        differences = torch.stack([x_T - truth, again - x_0])
        errors.append(differences.square().mean((1, 2, 3, 4)).sqrt())

    errors = torch.stack(errors)
    orders = torch.log2(errors[:-1] / errors[1:])
    assert ((orders > 0.9) & (orders < 1.15)).all()
    assert errors[-1].max() < 0.012


def test_inversion_calls_the_network_where_it_is():
    """Each step asks at the timestep of its state, and the first one at the lowest timestep."""
    asked = []

    def network(x_t, t):
        asked.append(t[0].item())
        return torch.zeros_like(x_t)

    scheduler = NoiseScheduler(1000)
    denoiser = Denoiser(network, scheduler)
    # Without noise in the image, the states are the image times sqrt(alpha_bar).
    x_T = ddim_invert(denoiser, torch.ones(1, 3, 8, 8), [999, 600, 20, -1])
    assert asked == [20, 20, 600]
    expected = torch.full((1, 3, 8, 8), scheduler.alpha_bar(999) ** 0.5)
    torch.testing.assert_close(x_T, expected)
