"""The training objective."""

from torch import Tensor

from functions.noise_scheduler import NoiseScheduler
from functions.prediction import Model


def noise_prediction_loss(model: Model, scheduler: NoiseScheduler, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """L_simple of DDPM (Ho et al. 2020, Eq. 14, Algorithm 1's line 5): ||eps - eps_theta(x_t, t)||^2 / (C H W).

    x_t is made in the precision of x_0 (float32), whatever the model computes in: in half precision the small noise
    of the first timesteps would drown in rounding.

    Args:
        x_0: (B, C, H, W) clean images in [-1, 1]; t: (B,) int64; noise: (B, C, H, W) standard normal.

    Returns:
        (B,) float32: each image's squared error, averaged over its channels and pixels.
    """
    x_t = scheduler.q_sample(x_0, t, noise)
    predicted_noise = model(x_t, t).float()
    return (predicted_noise - noise).square().flatten(1).mean(dim=1)
