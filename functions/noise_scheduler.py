"""The forward process: linear betas and everything in closed form that follows from them.

    x_0         clean image in [-1, 1]                     x_t        image after t + 1 noising steps
    beta        variance of the noise added in one step     alpha      1 - beta
    alpha_bar   running product of alpha: `alphas_cumprod`  eps        the standard normal noise in x_t
    T           number of steps: `timesteps`                t          0 .. T-1: the paper's t minus 1

Equations are those of Ho et al., "Denoising Diffusion Probabilistic Models", 2020 (arXiv:2006.11239).
"""

import torch
from torch import Tensor

REFERENCE_TIMESTEPS = 1000  # the number of steps that the paper's beta range is meant for


class NoiseScheduler:
    """Linear betas and the coefficients of q(x_t | x_0) and q(x_{t-1} | x_t, x_0).

    The schedule is computed in float64; a coefficient is used in the dtype of the image it multiplies. `to` moves the
    tables to a device. Not an `nn.Module`: it has nothing to learn, and an EMA must never average it.

    Args:
        timesteps: T, at least 2.
        beta_start, beta_end: the first and the last beta for T = 1000; 0 < beta_start <= beta_end < 1.
        rescale_betas: multiply both by 1000 / T, so that any T ends at nearly the same noise as 1000 steps.

    Raises:
        ValueError: T below 2, or betas (after rescaling) outside (0, 1) or falling.
    """

    def __init__(self, timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02, rescale_betas: bool = True):
        if timesteps < 2:
            raise ValueError(f"timesteps is {timesteps}; a schedule needs at least 2")
        scale = REFERENCE_TIMESTEPS / timesteps if rescale_betas else 1.0
        first, last = scale * beta_start, scale * beta_end
        if not 0 < first <= last < 1:
            raise ValueError(
                f"betas from {first:g} to {last:g} (timesteps = {timesteps}, rescaled by {scale:g}); "
                "they must rise and stay between 0 and 1: use more timesteps or smaller betas"
            )
        self.timesteps = timesteps
        self.betas = torch.linspace(first, last, timesteps, dtype=torch.float64)  # (T,), as all tables here
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)
        alphas_cumprod_previous = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])

        # q(x_t | x_0), Eq. 4
        self.sqrt_alphas_cumprod = self.alphas_cumprod.sqrt()
        self.sqrt_one_minus_alphas_cumprod = (1 - self.alphas_cumprod).sqrt()
        # q(x_{t-1} | x_t, x_0), Eqs. 6-7
        self.posterior_variance = self.betas * (1 - alphas_cumprod_previous) / (1 - self.alphas_cumprod)
        self.posterior_mean_x_0 = self.betas * alphas_cumprod_previous.sqrt() / (1 - self.alphas_cumprod)
        self.posterior_mean_x_t = (1 - alphas_cumprod_previous) * (1 - self.betas).sqrt() / (1 - self.alphas_cumprod)

    def to(self, device: torch.device | str) -> "NoiseScheduler":
        """Move the tables to a device, in place, as `nn.Module.to` does.

        float64 stays on the CPU and on CUDA; MPS has none, so the tables are rounded to float32 there.
        """
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device, dtype))
        return self

    @property
    def terminal_snr(self) -> float:
        """alpha_bar_T / (1 - alpha_bar_T): how much of the image is left in x_T, where sampling assumes none."""
        alpha_bar_T = self.alphas_cumprod[-1].item()
        return alpha_bar_T / (1 - alpha_bar_T)

    def q_sample(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Noise x_0 to step t at once (Eq. 4): sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps.

        Args:
            x_0: (B, C, H, W) images; t: (B,) int64; noise: (B, C, H, W) standard normal.
        """
        return at(self.sqrt_alphas_cumprod, t, x_0) * x_0 + at(self.sqrt_one_minus_alphas_cumprod, t, x_0) * noise

    def predict_x_0(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The x_0 that x_t and its noise imply (Eq. 15): (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t)."""
        return (x_t - at(self.sqrt_one_minus_alphas_cumprod, t, x_t) * eps) / at(self.sqrt_alphas_cumprod, t, x_t)

    def predict_eps(self, x_t: Tensor, t: Tensor, x_0: Tensor) -> Tensor:
        """The noise that x_t and x_0 imply: Eq. 15 the other way round, for use after x_0 was clipped."""
        return (x_t - at(self.sqrt_alphas_cumprod, t, x_t) * x_0) / at(self.sqrt_one_minus_alphas_cumprod, t, x_t)

    def q_posterior(self, x_0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """q(x_{t-1} | x_t, x_0) (Eqs. 6-7): its mean (B, C, H, W), and its variance (B, 1, 1, 1), 0 at t = 0."""
        mean = at(self.posterior_mean_x_0, t, x_t) * x_0 + at(self.posterior_mean_x_t, t, x_t) * x_t
        return mean, at(self.posterior_variance, t, x_t)


def at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """Look a (T,) table up at t (B,), as (B, 1, 1, 1) in the dtype of `like`, ready to multiply images."""
    return table[t].to(like.dtype).view(-1, *([1] * (like.dim() - 1)))
