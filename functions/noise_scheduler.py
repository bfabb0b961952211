"""The forward process: the betas, and the closed forms that follow from them.

    T           number of timesteps: `timesteps`
    t           0 .. T-1, the paper's t minus 1; -1 means the clean image
    s           where a step from t leads: t - 1 in the paper, or lower, to take fewer steps
    x_0         clean image in [-1, 1], (B, C, H, W)
    x_t         x_0 after t + 1 steps of noise, (B, C, H, W)
    eps         the standard normal noise in x_t, (B, C, H, W)
    beta        variance of the noise that one step adds: `betas`, (T,)
    alpha       1 - beta
    alpha_bar   product of alpha from the first timestep to t. The whole table is `alphas_cumprod`,
                (T,); `alpha_bar(t)` looks one up; a_t and a_s are those at timesteps t and s
    SNR         signal-to-noise ratio of x_t, alpha_bar / (1 - alpha_bar)
    v           sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0, which can be predicted instead of eps

Equations without a source are those of Ho et al., "Denoising Diffusion Probabilistic Models", 2020
(arXiv:2006.11239).
"""

import math
from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor

# The paper's betas are for this many timesteps. Times 1000 / T, T of them add nearly as much noise.
PAPER_TIMESTEPS = 1000
# The tables of more timesteps, which would be far above any experiment, could fill the memory.
LARGEST_TIMESTEPS = 10**6

# Samplers pass one timestep for the whole batch. Training passes one per image, (B,) int64.
Timestep = int | Tensor
# For an int t a coefficient is a Python number. For (B,) timesteps it is (B,) float64.
Coefficient = float | Tensor


def broadcast(coefficient: Coefficient, x: Tensor) -> Coefficient:
    """Return a coefficient for x (B, ...): a number, or (B,) as (B, 1, ...) in the dtype of x."""
    if isinstance(coefficient, float):
        return coefficient
    return coefficient.to(x).view(-1, *[1] * (x.dim() - 1))


def linear_betas(timesteps: int, beta_start: float, beta_end: float, rescale_betas: bool) -> Tensor:
    """Return betas that rise linearly (Section 4), times 1000 / T if rescaled: (T,) float64."""
    scale = PAPER_TIMESTEPS / timesteps if rescale_betas else 1.0
    first = scale * beta_start
    last = scale * beta_end
    if not 0 < first <= last < 1:
        raise ValueError(
            f"beta_start is {beta_start:g} and beta_end is {beta_end:g}; with {timesteps} "
            f"timesteps they must satisfy 0 < beta_start <= beta_end < {1 / scale:g}: "
            "use more timesteps or smaller betas"
        )
    return torch.linspace(first, last, timesteps, dtype=torch.float64)


def cosine_betas(timesteps: int) -> Tensor:
    """Return the cosine schedule of Nichol and Dhariwal 2021, arXiv:2102.09672: (T,) float64.

    Its alpha_bar is proportional to cos^2(pi / 2 * (t / T + 0.008) / 1.008) (Eq. 17). Betas are
    at most 0.999.
    """
    # Here t is the paper's, 0 .. T, and t = 0 is the clean image.
    t = torch.arange(timesteps + 1, dtype=torch.float64)
    alpha_bar = torch.cos((t / timesteps + 0.008) / 1.008 * math.pi / 2).square()
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


# The values of a config's `beta_schedule`: functions of T that return betas (T,) float64. They take
# those of beta_start, beta_end and rescale_betas that their signatures name.
BETA_SCHEDULES = {"linear": linear_betas, "cosine": cosine_betas}


def shifted_betas(betas: Tensor, shift: float) -> Tensor:
    """Return betas whose log-SNR at each t is that of `betas` plus `shift`: (T,) float64.

    With the shift 2 log(64 / S), an image of S x S pixels, shrunk to 64 x 64, has as much noise as
    one of 64 x 64 without a shift (Hoogeboom et al. 2023, arXiv:2301.11093, Section 3).
    """
    alpha_bar = torch.cumprod(1 - betas, dim=0)
    before = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])

    # The shifted alpha_bar is alpha_bar / sum_t, and the one before it is before / sum_s. Their
    # ratio is the shifted alpha. In this form nothing is divided by a tiny alpha_bar.
    factor = math.exp(-shift)
    sum_t = alpha_bar + factor * (1 - alpha_bar)
    sum_s = before + factor * (1 - before)
    return 1 - (1 - betas) * sum_s / sum_t


class NoiseScheduler:
    """The betas, q(x_t | x_0) and q(x_s | x_t, x_0).

    The schedule is computed in float64, and cast to the dtype of the tensor that it multiplies.
    Coefficients are looked up on the device of t, and on the CPU for an int t, so no lookup
    synchronises with a GPU. Raises ValueError for arguments that give no valid schedule.

    Args:
        timesteps: T, at least 2.
        beta_start, beta_end: the first and the last beta for T = 1000, between 0 and 1.
        rescale_betas: multiply both by 1000 / T, so that x_T has nearly the same noise for every T.
        beta_schedule: a key of BETA_SCHEDULES. One of the three arguments before it that its
            function does not take must have its default.
        log_snr_shift: the betas are changed so that this is added to the log-SNR at every t.
            Below 0 it adds noise, for images above 64 x 64.
        betas: T betas of one's own, in place of those of `beta_schedule`.
    """

    # This class is not an `nn.Module`: the schedule is not learned, and EMA must never average it.

    def __init__(
        self,
        timesteps: int,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        rescale_betas: bool = True,
        beta_schedule: str = "linear",
        log_snr_shift: float = 0.0,
        betas: Tensor | Sequence[float] = (),
    ):
        self.timesteps = timesteps
        if beta_schedule not in BETA_SCHEDULES:
            raise ValueError(
                f"beta_schedule is {beta_schedule!r}; it must be {' or '.join(BETA_SCHEDULES)}"
            )
        if not 2 <= timesteps <= LARGEST_TIMESTEPS:
            raise ValueError(f"there are {timesteps} timesteps, not 2 to {LARGEST_TIMESTEPS:,}")
        schedule = BETA_SCHEDULES[beta_schedule]
        taken = signature(schedule).parameters
        given = {"beta_start": beta_start, "beta_end": beta_end, "rescale_betas": rescale_betas}
        for name, value in given.items():
            if name not in taken and value != signature(NoiseScheduler).parameters[name].default:
                raise ValueError(f"{name} is {value}, and {beta_schedule} betas do not take it")
        if len(betas):
            self.betas = torch.as_tensor(betas, dtype=torch.float64, device="cpu")
            if len(betas) != timesteps or not ((self.betas > 0) & (self.betas < 1)).all():
                raise ValueError(
                    f"there are {len(betas)} betas; they must be {timesteps}, one for each "
                    "timestep, and between 0 and 1"
                )
        else:
            values = {name: value for name, value in given.items() if name in taken}
            self.betas = schedule(timesteps, **values)
        self.log_snr_shift = log_snr_shift
        if log_snr_shift:
            self.betas = shifted_betas(self.betas, log_snr_shift)
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)  # (T,) float64, on the CPU
        if self.alphas_cumprod[-1] < torch.finfo(torch.float64).tiny:
            raise ValueError(
                f"{timesteps} timesteps with betas up to {self.betas.max():g}: alpha_bar "
                "underflows, and no x_0 follows from x_t; use smaller betas"
            )
        # Copies of alpha_bar on each device that has been used so far.
        self.tables: dict[torch.device, Tensor] = {}

    def alpha_bar(self, t: Timestep) -> Coefficient:
        """Return alpha_bar at t, which is 1 at -1: a Python number for an int, or (B,) float64."""
        if isinstance(t, int):
            return self.alphas_cumprod[t].item() if t >= 0 else 1.0

        # MPS has no float64, so t is copied to the CPU and looked up there.
        if t.device.type == "mps":
            t = t.cpu()
        device = t.device
        if device not in self.tables:
            self.tables[device] = self.alphas_cumprod.to(device)
        return torch.where(t < 0, 1.0, self.tables[device][t])

    def square_roots(self, t: Timestep, x: Tensor) -> tuple[Coefficient, Coefficient]:
        """Return sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), broadcast to the shape of x."""
        a_t = self.alpha_bar(t)
        return broadcast(a_t**0.5, x), broadcast((1 - a_t) ** 0.5, x)

    def q_sample(self, x_0: Tensor, t: Timestep, noise: Tensor) -> Tensor:
        """Sample x_t from q(x_t | x_0) in one step (Eq. 4); noise is standard normal."""
        sqrt_a, sqrt_1_minus_a = self.square_roots(t, x_0)
        return sqrt_a * x_0 + sqrt_1_minus_a * noise

    def predict_x_0(self, x_t: Tensor, t: Timestep, eps: Tensor) -> Tensor:
        """Return the x_0 that x_t and eps imply (Eq. 15)."""
        sqrt_a, sqrt_1_minus_a = self.square_roots(t, x_t)
        return (x_t - sqrt_1_minus_a * eps) / sqrt_a

    def predict_eps(self, x_t: Tensor, t: Timestep, x_0: Tensor) -> Tensor:
        """Return the eps that x_t and x_0 imply (Eq. 15 solved for eps)."""
        sqrt_a, sqrt_1_minus_a = self.square_roots(t, x_t)
        return (x_t - sqrt_a * x_0) / sqrt_1_minus_a

    def v(self, x_0: Tensor, t: Timestep, noise: Tensor) -> Tensor:
        """Return v (Salimans and Ho 2022, arXiv:2202.00512, Section 4)."""
        sqrt_a, sqrt_1_minus_a = self.square_roots(t, x_0)
        return sqrt_a * noise - sqrt_1_minus_a * x_0

    def predict_from_v(self, x_t: Tensor, t: Timestep, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the x_0 and the eps that x_t and v imply (the same paper, Appendix D)."""
        # (x_t, v) is a rotation of (x_0, eps). So its inverse does not divide by sqrt(alpha_bar_t),
        # which may be near 0.
        sqrt_a, sqrt_1_minus_a = self.square_roots(t, x_t)
        x_0 = sqrt_a * x_t - sqrt_1_minus_a * v
        eps = sqrt_1_minus_a * x_t + sqrt_a * v
        return x_0, eps

    def step_beta(self, t: Timestep, s: Timestep) -> Coefficient:
        """Return beta_t if s = t - 1; else that of all steps after s up to t, taken at once."""
        # Their alpha is the product of all alphas, a_t / a_s (Nichol and Dhariwal 2021, Eq. 19).
        return 1 - self.alpha_bar(t) / self.alpha_bar(s)

    def posterior_variance(self, t: Timestep, s: Timestep) -> Coefficient:
        """Return the variance of q(x_s | x_t, x_0), beta tilde of Eq. 7; it is 0 at s = -1."""
        return (1 - self.alpha_bar(s)) / (1 - self.alpha_bar(t)) * self.step_beta(t, s)

    def q_posterior(
        self, x_0: Tensor, x_t: Tensor, t: Timestep, s: Timestep
    ) -> tuple[Tensor, Coefficient]:
        """Return mean (B, C, H, W) and variance of q(x_s | x_t, x_0) for a step from t to s.

        With s = t - 1 they are mu tilde and beta tilde of Eqs. 6 and 7; with s = -1, x_0 and 0. The
        variance is a Python number for ints, and (B, 1, 1, 1) for (B,) timesteps.
        """
        a_t = self.alpha_bar(t)
        a_s = self.alpha_bar(s)
        beta = self.step_beta(t, s)
        alpha = 1 - beta
        # The mean is (sqrt(a_s) beta x_0 + sqrt(alpha) (1 - a_s) x_t) / (1 - a_t).
        x_0_weight = a_s**0.5 * beta / (1 - a_t)
        x_t_weight = alpha**0.5 * (1 - a_s) / (1 - a_t)
        mean = broadcast(x_0_weight, x_t) * x_0 + broadcast(x_t_weight, x_t) * x_t
        return mean, broadcast(self.posterior_variance(t, s), x_t)

    def log_snr(self, t: int) -> float:
        """Return the log-SNR at t; 200 at -1, where it is infinite."""
        a_t = self.alpha_bar(t)
        # 200 is large enough: the noise that it leaves is negligible.
        return math.log(a_t / (1 - a_t)) if a_t < 1 else 200.0

    @property
    def terminal_snr(self) -> float:
        """Return the SNR of x_T, which should be about 0: sampling starts from pure noise."""
        alpha_bar_T = self.alpha_bar(self.timesteps - 1)
        return alpha_bar_T / (1 - alpha_bar_T)


def build_scheduler(config: dict[str, Any]) -> NoiseScheduler:
    """Build the schedule of the fields of a `DiffusionConfig`. Those without a value have defaults.

    Raises ValueError as `NoiseScheduler` does.
    """
    _, *names = signature(NoiseScheduler).parameters
    values = {name: config[name] for name in names if name in config}
    return NoiseScheduler(config["timesteps_diff"], **values)
