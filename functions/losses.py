"""The training objective."""

from torch import Tensor

from functions.denoiser import OBJECTIVES, Denoiser


def denoising_loss(denoiser: Denoiser, x_0: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """Return the losses of each image by name: (B,) float32 each.

    `loss` is minimised: ||eps - eps_theta(x_t, t)||^2 / (C H W), L_simple of Eq. 14 of Ho et al.
    2020, and line 5 of their Algorithm 1. For a `Denoiser` that predicts v, it is the squared error
    of v. All others are only recorded: `eps_error` is the squared error of the eps that the
    prediction implies, so that runs of all objectives can be compared. Each name is a column of
    metrics.csv, and so are its means over held-out images, val_NAME and val_NAME_ema.

    x_0 (B, C, H, W) is in [-1, 1], t is (B,) int64, and noise (B, C, H, W) is standard normal.
    """
    scheduler = denoiser.scheduler
    objective = OBJECTIVES[denoiser.objective]
    # x_t is float32, like x_0, even if the network computes in half precision. It is rounded only
    # once, by the network's first convolution.
    x_t = scheduler.q_sample(x_0, t, noise)
    target = objective.target(scheduler, x_0, t, noise)
    output = denoiser(x_t, t)  # (B, C, H, W) float32: eps_theta(x_t, t), or the network's v
    loss = (output - target).square().flatten(1).mean(dim=1)

    # What is recorded needs no gradient.
    _, eps = objective.from_output(scheduler, x_t, t, output.detach())
    eps_error = (eps - noise).square().flatten(1).mean(dim=1)
    return {"loss": loss, "eps_error": eps_error}
