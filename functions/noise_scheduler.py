"""The forward process: betas and everything in closed form that follows from them.

    x_0         clean image in [-1, 1]                      x_t        noised image; one step makes t = 0
    beta        variance of the noise added in one step     alpha      1 - beta
    alpha_bar   running product of alpha: `alphas_cumprod`  a_t, a_s   alpha_bar at timesteps t and s
    eps         the standard normal noise in x_t            v          sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0
    T           number of steps: `timesteps`                t          0 .. T-1: the paper's t minus 1; -1: clean

Equations are those of Ho et al., "Denoising Diffusion Probabilistic Models", 2020 (arXiv:2006.11239).
"""

import math

import torch
from torch import Tensor

PAPER_TIMESTEPS = 1000  # the number of steps that the paper's beta range is meant for

# One for all images, as samplers have it; or (B,) int64, as training has it
Timestep = int | Tensor
Coefficient = float | Tensor  # one for all images, or (B,) float64


class NoiseScheduler:
    """The betas, q(x_t | x_0) and q(x_s | x_t, x_0).

    The schedule is computed in float64; a coefficient is used in the dtype of the image it multiplies. It is looked up
    on the device of t, and with an int t on the host, so nothing waits for a device. Not an `nn.Module`: it has
    nothing to learn, and an EMA must never average it. Raises ValueError for what the arguments cannot be.

    Args:
        timesteps: T, at least 2.
        beta_start, beta_end: the first and the last beta for T = 1000; 0 < beta_start <= beta_end < 1, also rescaled.
        rescale_betas: multiply both by 1000 / T, so that any T ends at nearly the same noise as 1000 steps.
        beta_schedule: "linear"; or "cosine" (`cosine_betas`), which has no use for the three before.
    """

    def __init__(
        self,
        timesteps: int,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        rescale_betas: bool = True,
        beta_schedule: str = "linear",
    ):
        if timesteps < 2 or beta_schedule not in ("linear", "cosine"):
            raise ValueError(
                f"{timesteps} timesteps, {beta_schedule!r}: there must be 2 or more, linear or cosine"
            )
        scale = PAPER_TIMESTEPS / timesteps if rescale_betas else 1.0
        linear = beta_schedule == "linear"
        self.timesteps = timesteps
        # (T,) float64, on the CPU
        self.betas = (
            linear_betas(timesteps, beta_start, beta_end, scale)
            if linear
            else cosine_betas(timesteps)
        )
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)  # (T,)
        # (T + 1,) on each device that asks: 1, and alphas_cumprod
        self.tables: dict[torch.device, Tensor] = {}

    @property
    def terminal_snr(self) -> float:
        """alpha_bar_T / (1 - alpha_bar_T): how much of the image is left in x_T, where sampling assumes none."""
        alpha_bar_T = self.alpha_bar(self.timesteps - 1)
        return alpha_bar_T / (1 - alpha_bar_T)

    def alpha_bar(self, t: Timestep) -> Coefficient:
        """alpha_bar at t, and 1 at t = -1, in float64: a Python number for an int, (B,) for (B,) timesteps.

        Raises IndexError when t is not one of -1 .. T-1 (on CUDA, for (B,) timesteps, its own error).
        """
        if isinstance(t, int):
            if not -1 <= t < self.timesteps:
                raise IndexError(
                    f"t is {t}; it can be 0 to {self.timesteps - 1}, and -1 for the clean image"
                )
            return self.alphas_cumprod[t].item() if t >= 0 else 1.0
        # MPS has no float64, so there this waits
        device = torch.device("cpu") if t.device.type == "mps" else t.device
        if device not in self.tables:
            self.tables[device] = torch.cat(
                [torch.ones(1, dtype=torch.float64), self.alphas_cumprod]
            ).to(device)
        return self.tables[device][t.to(device) + 1]

    def q_sample(self, x_0: Tensor, t: Timestep, noise: Tensor) -> Tensor:
        """Noise x_0 to step t at once (Eq. 4): sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps.

        x_0 are (B, C, H, W) images; t is (B,) int64, or an int; the noise is (B, C, H, W) standard normal.
        """
        a_t = self.alpha_bar(t)
        return broadcast(a_t**0.5, x_0) * x_0 + broadcast((1 - a_t) ** 0.5, x_0) * noise

    def predict_x_0(self, x_t: Tensor, t: Timestep, eps: Tensor) -> Tensor:
        """The x_0 that x_t and its noise imply (Eq. 15): (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t)."""
        a_t = self.alpha_bar(t)
        return (x_t - broadcast((1 - a_t) ** 0.5, x_t) * eps) / broadcast(a_t**0.5, x_t)

    def predict_eps(self, x_t: Tensor, t: Timestep, x_0: Tensor) -> Tensor:
        """The noise that x_t and x_0 imply: Eq. 15 the other way round, for use after x_0 was clipped."""
        a_t = self.alpha_bar(t)
        return (x_t - broadcast(a_t**0.5, x_t) * x_0) / broadcast((1 - a_t) ** 0.5, x_t)

    def v(self, x_0: Tensor, t: Timestep, noise: Tensor) -> Tensor:
        """sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0 (Salimans and Ho 2022, arXiv:2202.00512, Section 4)."""
        a_t = self.alpha_bar(t)
        return broadcast(a_t**0.5, x_0) * noise - broadcast((1 - a_t) ** 0.5, x_0) * x_0

    def predict_from_v(self, x_t: Tensor, t: Timestep, v: Tensor) -> tuple[Tensor, Tensor]:
        """The x_0 and the eps that x_t and its v imply: a rotation, so that nothing is divided by sqrt(alpha_bar_t)."""
        a_t = self.alpha_bar(t)
        root, root_of_rest = broadcast(a_t**0.5, x_t), broadcast((1 - a_t) ** 0.5, x_t)
        return root * x_t - root_of_rest * v, root_of_rest * x_t + root * v

    def step_beta(self, t: Timestep, s: Timestep) -> Coefficient:
        """beta of a step between t and an earlier s: 1 - alpha_bar_t / alpha_bar_s; `betas[t]` where s = t - 1.

        alpha_bar_t / alpha_bar_s is the product of the alphas between: several steps are one of that alpha (Nichol and
        Dhariwal 2021, arXiv:2102.09672, Eq. 19).
        """
        return 1 - self.alpha_bar(t) / self.alpha_bar(s)

    def posterior_variance(self, t: Timestep, s: Timestep) -> Coefficient:
        """The variance of q(x_s | x_t, x_0) (Eq. 7), in float64; 0 at s = -1, the clean image."""
        return (1 - self.alpha_bar(s)) / (1 - self.alpha_bar(t)) * self.step_beta(t, s)

    def q_posterior(
        self, x_0: Tensor, x_t: Tensor, t: Timestep, s: Timestep
    ) -> tuple[Tensor, Coefficient]:
        """q(x_s | x_t, x_0) for a step from t to an earlier s: its mean (B, C, H, W) and its variance (Eqs. 6, 7).

        With s = t - 1 this is the paper's. With s = -1, the clean image, the mean is x_0 and the variance 0.
        For ints the variance is a Python number, for (B,) timesteps (B, 1, 1, 1).
        """
        a_t, a_s, beta = self.alpha_bar(t), self.alpha_bar(s), self.step_beta(t, s)
        of_x_0 = a_s**0.5 * beta / (1 - a_t)
        of_x_t = (1 - beta) ** 0.5 * (1 - a_s) / (1 - a_t)
        mean = broadcast(of_x_0, x_t) * x_0 + broadcast(of_x_t, x_t) * x_t
        return mean, broadcast(self.posterior_variance(t, s), x_t)


def linear_betas(timesteps: int, beta_start: float, beta_end: float, scale: float) -> Tensor:
    """The paper's betas (Section 4), times `scale`: (T,) float64."""
    first, last = scale * beta_start, scale * beta_end
    if not 0 < first <= last < 1:
        raise ValueError(
            f"betas from {first:g} to {last:g} (timesteps = {timesteps}, rescaled by {scale:g}); "
            "they must rise and stay between 0 and 1: use more timesteps or smaller betas"
        )
    return torch.linspace(first, last, timesteps, dtype=torch.float64)


def cosine_betas(timesteps: int) -> Tensor:
    """The betas of alpha_bar = cos^2((t / T + 0.008) / 1.008 pi / 2), at most 0.999: (T,) float64.

    Nichol and Dhariwal 2021, arXiv:2102.09672, Eq. 17; t is the paper's, and alpha_bar is 1 at 0.
    """
    t = torch.arange(timesteps + 1, dtype=torch.float64)
    alpha_bar = torch.cos((t / timesteps + 0.008) / 1.008 * math.pi / 2).square()
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


def broadcast(coefficient: Coefficient, images: Tensor) -> Coefficient:
    """A coefficient to multiply images with: (B,) becomes (B, 1, 1, 1) of their dtype, a Python number stays one."""
    if isinstance(coefficient, float):
        return coefficient
    return coefficient.to(images).view(-1, *[1] * (images.dim() - 1))
