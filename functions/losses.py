"""The training objective."""

from torch import Tensor

from functions.noise_scheduler import NoiseScheduler
from functions.prediction import Model


def denoising_loss(
    model: Model, scheduler: NoiseScheduler, x_0: Tensor, t: Tensor, noise: Tensor
) -> Tensor:
    """L_simple of DDPM (Ho et al. 2020, Eq. 14, Algorithm 1's line 5): ||eps - eps_theta(x_t, t)||^2 / (C H W).

    For a `Denoiser` whose network predicts v it is the squared error of v (Salimans and Ho 2022, arXiv:2202.00512,
    Section 4). x_t is made in the precision of x_0 (float32), whatever the model computes in: in half precision the
    small noise of the first timesteps would drown in rounding.

    Args:
        x_0: (B, C, H, W) clean images in [-1, 1]; t: (B,) int64; noise: (B, C, H, W) standard normal.

    Returns:
        (B,) float32: each image's squared error, averaged over its channels and pixels.
    """
    x_t = scheduler.q_sample(x_0, t, noise)
    target = scheduler.v(x_0, t, noise) if getattr(model, "objective", "eps") == "v" else noise
    return (model(x_t, t).float() - target).square().flatten(1).mean(dim=1)


def eps_errors(model: Model, scheduler: NoiseScheduler, losses: Tensor, t: Tensor) -> Tensor:
    """The squared errors (B,) of eps that belong to these losses (B,), to compare objectives by.

    In the same x_t an error of v is one of sqrt(alpha_bar) as much in eps, and one of -sqrt(1 - alpha_bar) in x_0.
    """
    return (
        scheduler.alpha_bar(t).to(losses) * losses
        if getattr(model, "objective", "eps") == "v"
        else losses
    )
