"""The training objective."""

from torch import Tensor

from functions.noise_scheduler import NoiseScheduler, broadcast
from functions.prediction import Model, objective_of


def denoising_loss(
    model: Model, scheduler: NoiseScheduler, x_0: Tensor, t: Tensor, noise: Tensor
) -> Tensor:
    """Return L_simple of DDPM, ||eps - eps_theta(x_t, t)||^2 / (C H W), of each image.

    It is Eq. 14 and line 5 of Algorithm 1 of Ho et al. 2020. For a `Denoiser` of another objective
    it is the squared error of what that predicts, such as v.

    Args:
        x_0: (B, C, H, W) clean images in [-1, 1].
        t: (B,) int64 timesteps.
        noise: (B, C, H, W) standard normal.

    Returns:
        (B,) float32: each image's squared error, averaged over its channels and pixels.
    """
    # x_t has the precision of x_0, float32, whatever the model computes in. In half precision the
    # small noise of the first timesteps would drown in rounding.
    x_t = scheduler.q_sample(x_0, t, noise)
    target = objective_of(model).target(scheduler, x_0, t, noise)
    squared_errors = (model(x_t, t).float() - target).square()  # (B, C, H, W)
    return squared_errors.flatten(1).mean(dim=1)


def eps_errors(model: Model, scheduler: NoiseScheduler, losses: Tensor, t: Tensor) -> Tensor:
    """Return the squared errors of eps (B,) that belong to these losses (B,).

    By them, models of different objectives can be compared.
    """
    factor = objective_of(model).eps_factor(scheduler, t)
    return broadcast(factor, losses) * losses
