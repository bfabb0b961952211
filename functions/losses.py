"""The training objective."""

from torch import Tensor

from functions.denoiser import OBJECTIVES, Denoiser
from functions.noise_scheduler import broadcast


def denoising_loss(denoiser: Denoiser, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Return L_simple of each image, ||eps - eps_theta(x_t, t)||^2 / (C H W).

    This is Eq. 14 of Ho et al. 2020, and line 5 of their Algorithm 1. For a `Denoiser` that
    predicts v, it is the squared error of v.

    Args:
        x_0: (B, C, H, W) clean images in [-1, 1].
        t: (B,) int64 timesteps.
        noise: (B, C, H, W) standard normal.

    Returns:
        (B,) float32: each image's squared error, averaged over its channels and pixels.
    """
    # x_t is float32, like x_0, even if the network computes in half precision. It is rounded only
    # once, by the network's first convolution.
    x_t = denoiser.scheduler.q_sample(x_0, t, noise)
    target = OBJECTIVES[denoiser.objective].target(denoiser.scheduler, x_0, t, noise)
    squared_errors = (denoiser(x_t, t) - target).square()  # (B, C, H, W)
    return squared_errors.flatten(1).mean(dim=1)


def eps_errors(denoiser: Denoiser, losses: Tensor, t: Tensor) -> Tensor:
    """Convert a denoiser's losses, (B,), to squared errors of eps, (B,).

    Errors of eps can be compared between models of different objectives. t is (B,) int64.
    """
    factor = OBJECTIVES[denoiser.objective].eps_factor(denoiser.scheduler, t)
    return broadcast(factor, losses) * losses
