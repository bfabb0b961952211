"""The forward process: the betas, and everything in closed form that follows from them.

    T           number of steps: `timesteps`
    t           0 .. T-1, the paper's t minus 1; -1 means the clean image
    x_0         clean image in [-1, 1]
    x_t         noised image; one step of noise makes t = 0
    beta        variance of the noise that is added in one step
    alpha       1 - beta
    alpha_bar   running product of alpha: `alphas_cumprod`
    a_t, a_s    alpha_bar at timesteps t and s
    eps         the standard normal noise in x_t
    v           sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0

The equations are those of Ho et al., "Denoising Diffusion Probabilistic Models", 2020
(arXiv:2006.11239).
"""

import math

import torch
from torch import Tensor

# The paper's range of betas is meant for this many steps.
PAPER_TIMESTEPS = 1000

# Samplers have one timestep for all images, and training has (B,) int64.
Timestep = int | Tensor
# Accordingly a coefficient is one Python number for all images, or (B,) float64.
Coefficient = float | Tensor


class NoiseScheduler:
    """The betas, q(x_t | x_0) and q(x_s | x_t, x_0).

    The schedule is computed in float64, and a coefficient is used in the dtype of the images that
    it multiplies. It is looked up on the device of t, and with an int t on the host, so that
    nothing waits for a device. Raises ValueError for arguments that make no schedule.

    Args:
        timesteps: T, at least 2.
        beta_start, beta_end: the first and the last beta for T = 1000. After rescaling, too,
            0 < beta_start <= beta_end < 1.
        rescale_betas: multiply both by 1000 / T, so that any T ends at nearly the same noise as
            1000 steps.
        beta_schedule: "linear"; or "cosine" (`cosine_betas`), which ignores the three before.
    """

    # This is no `nn.Module`: it has nothing to learn, and an EMA must never average it.

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
                f"{timesteps} timesteps, {beta_schedule!r}: "
                "there must be 2 or more, linear or cosine"
            )
        self.timesteps = timesteps
        if beta_schedule == "linear":
            scale = PAPER_TIMESTEPS / timesteps if rescale_betas else 1.0
            self.betas = linear_betas(timesteps, beta_start, beta_end, scale)
        else:
            self.betas = cosine_betas(timesteps)
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)  # (T,) float64, on the CPU
        # `alpha_bar` keeps a table (T + 1,) here on each device that asks for one.
        self.tables: dict[torch.device, Tensor] = {}

    @property
    def terminal_snr(self) -> float:
        """How much of the image is left in x_T, where sampling assumes none: its SNR."""
        alpha_bar_T = self.alpha_bar(self.timesteps - 1)
        return alpha_bar_T / (1 - alpha_bar_T)

    def alpha_bar(self, t: Timestep) -> Coefficient:
        """Return alpha_bar at t, which is 1 at t = -1, in float64.

        It is a Python number for an int, and (B,) for (B,) timesteps. Raises IndexError when t is
        not one of -1 .. T-1 (on CUDA, for (B,) timesteps, PyTorch raises its own error).
        """
        if isinstance(t, int):
            if not -1 <= t < self.timesteps:
                raise IndexError(
                    f"t is {t}; it can be 0 to {self.timesteps - 1}, and -1 for the clean image"
                )
            return self.alphas_cumprod[t].item() if t >= 0 else 1.0

        # MPS has no float64, so there the lookup is done on the CPU, and waits for t.
        if t.device.type == "mps":
            t = t.cpu()
        device = t.device
        if device not in self.tables:
            clean = self.alphas_cumprod.new_ones(1)
            self.tables[device] = torch.cat([clean, self.alphas_cumprod]).to(device)
        return self.tables[device][t + 1]

    def square_roots(self, t: Timestep, images: Tensor) -> tuple[Coefficient, Coefficient]:
        """Return sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), to multiply images with."""
        a_t = self.alpha_bar(t)
        return broadcast(a_t**0.5, images), broadcast((1 - a_t) ** 0.5, images)

    def q_sample(self, x_0: Tensor, t: Timestep, noise: Tensor) -> Tensor:
        """Noise images x_0 to timestep t at once (Eq. 4).

        x_0 is (B, C, H, W), t (B,) int64 or an int, and the noise (B, C, H, W) standard normal.
        """
        sqrt_a, sqrt_1_minus_a = self.square_roots(t, x_0)
        return sqrt_a * x_0 + sqrt_1_minus_a * noise

    def predict_x_0(self, x_t: Tensor, t: Timestep, eps: Tensor) -> Tensor:
        """Return the x_0 that x_t and its noise imply (Eq. 15)."""
        sqrt_a, sqrt_1_minus_a = self.square_roots(t, x_t)
        return (x_t - sqrt_1_minus_a * eps) / sqrt_a

    def predict_eps(self, x_t: Tensor, t: Timestep, x_0: Tensor) -> Tensor:
        """Return the noise that x_t and x_0 imply: Eq. 15 solved for eps, for a clipped x_0."""
        sqrt_a, sqrt_1_minus_a = self.square_roots(t, x_t)
        return (x_t - sqrt_a * x_0) / sqrt_1_minus_a

    def v(self, x_0: Tensor, t: Timestep, noise: Tensor) -> Tensor:
        """Return v (Salimans and Ho 2022, arXiv:2202.00512, Section 4)."""
        sqrt_a, sqrt_1_minus_a = self.square_roots(t, x_0)
        return sqrt_a * noise - sqrt_1_minus_a * x_0

    def predict_from_v(self, x_t: Tensor, t: Timestep, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the x_0 and the eps that x_t and its v imply."""
        # This is a rotation, so nothing is divided by sqrt(alpha_bar_t), which may be near 0.
        sqrt_a, sqrt_1_minus_a = self.square_roots(t, x_t)
        x_0 = sqrt_a * x_t - sqrt_1_minus_a * v
        eps = sqrt_1_minus_a * x_t + sqrt_a * v
        return x_0, eps

    def step_beta(self, t: Timestep, s: Timestep) -> Coefficient:
        """Return the beta of one step between t and an earlier s; `betas[t]` where s = t - 1."""
        # alpha_bar_t / alpha_bar_s is the product of the alphas between. Several steps are one step
        # of that alpha (Nichol and Dhariwal 2021, arXiv:2102.09672, Eq. 19).
        return 1 - self.alpha_bar(t) / self.alpha_bar(s)

    def posterior_variance(self, t: Timestep, s: Timestep) -> Coefficient:
        """Return the variance of q(x_s | x_t, x_0) (Eq. 7), in float64.

        It is 0 at s = -1, the clean image.
        """
        return (1 - self.alpha_bar(s)) / (1 - self.alpha_bar(t)) * self.step_beta(t, s)

    def q_posterior(
        self, x_0: Tensor, x_t: Tensor, t: Timestep, s: Timestep
    ) -> tuple[Tensor, Coefficient]:
        """Return mean and variance of q(x_s | x_t, x_0) for a step from t to an earlier s.

        With s = t - 1 these are Eqs. 6 and 7. With s = -1, the clean image, the mean is x_0 and the
        variance 0. The mean is (B, C, H, W). The variance is a Python number for ints, and
        (B, 1, 1, 1) for (B,) timesteps.
        """
        a_t = self.alpha_bar(t)
        a_s = self.alpha_bar(s)
        beta = self.step_beta(t, s)
        alpha = 1 - beta
        of_x_0 = a_s**0.5 * beta / (1 - a_t)
        of_x_t = alpha**0.5 * (1 - a_s) / (1 - a_t)
        mean = broadcast(of_x_0, x_t) * x_0 + broadcast(of_x_t, x_t) * x_t
        return mean, broadcast(self.posterior_variance(t, s), x_t)


def linear_betas(timesteps: int, beta_start: float, beta_end: float, scale: float) -> Tensor:
    """Return the paper's betas (Section 4), times `scale`: (T,) float64."""
    first = scale * beta_start
    last = scale * beta_end
    if not 0 < first <= last < 1:
        raise ValueError(
            f"betas from {first:g} to {last:g} (timesteps = {timesteps}, rescaled by {scale:g}); "
            "they must rise and stay between 0 and 1: use more timesteps or smaller betas"
        )
    return torch.linspace(first, last, timesteps, dtype=torch.float64)


def cosine_betas(timesteps: int) -> Tensor:
    """Return the betas of alpha_bar = cos^2((t / T + 0.008) / 1.008 pi / 2), at most 0.999.

    They are (T,) float64, of Nichol and Dhariwal 2021, arXiv:2102.09672, Eq. 17.
    """
    # Here t is the paper's, so alpha_bar is 1 at 0.
    t = torch.arange(timesteps + 1, dtype=torch.float64)
    alpha_bar = torch.cos((t / timesteps + 0.008) / 1.008 * math.pi / 2).square()
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


def broadcast(coefficient: Coefficient, images: Tensor) -> Coefficient:
    """Return a coefficient to multiply images with: (B,) becomes (B, 1, 1, 1) of their dtype.

    A Python number stays one.
    """
    if isinstance(coefficient, float):
        return coefficient
    return coefficient.to(images).view(-1, *[1] * (images.dim() - 1))
