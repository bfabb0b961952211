"""The training objective."""

from torch import Tensor

from functions.denoiser import OBJECTIVES, Denoiser
from functions.noise_scheduler import broadcast


def denoising_loss(denoiser: Denoiser, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Return the loss of each image, ||eps - eps_theta(x_t, t)||^2 / (C H W): (B,) float32.

    This is L_simple, Eq. 14 of Ho et al. 2020, and line 5 of their Algorithm 1. For a `Denoiser`
    that predicts v, it is the squared error of v. x_0 (B, C, H, W) is in [-1, 1], t is (B,) int64,
    and noise (B, C, H, W) is standard normal.
    """
    # x_t is float32, like x_0, even if the network computes in half precision. It is rounded only
    # once, by the network's first convolution.
    x_t = denoiser.scheduler.q_sample(x_0, t, noise)
    target = OBJECTIVES[denoiser.objective].target(denoiser.scheduler, x_0, t, noise)
    output = denoiser(x_t, t)  # (B, C, H, W) float32: eps_theta(x_t, t), or the network's v
    return (output - target).square().flatten(1).mean(dim=1)


def eps_errors(denoiser: Denoiser, losses: Tensor, t: Tensor) -> Tensor:
    """Convert losses (B,) at t (B,) to squared errors of eps (B,), which compare all objectives."""
    factor = OBJECTIVES[denoiser.objective].eps_factor(denoiser.scheduler, t)
    return broadcast(factor, losses) * losses
