"""What a network knows of x_0 at each timestep, by spatial frequency: `python evaluate.py --metrics bands`.

For held-out images, the squared error of the network's x_0 (unclipped) over that of the average training image, in an
image's mean and in each octave of frequencies. 1 is no knowledge at all, and above 1 is a fault. The best linear filter
of x_t reaches (1 - a) / (a s^2 + 1 - a) with a = alpha_bar_t, and s^2 the squared error of the average image for each
coefficient of the orthonormal transform, in which the noise has 1. docs/whole-before-detail.md says what it is for.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import LogNorm
from torch import Tensor
from tqdm import tqdm

from functions.evaluation.bits_per_dim import error_of_mean
from functions.prediction import Denoiser, predict
from functions.sampling.calibration import band_means, spectrum
from functions.sampling.generation import BatchLimit
from functions.support.errors import UserError
from functions.support.pictures import plt, save_figure
from functions.support.processes import SINGLE_PROCESS, Processes
from functions.support.random_numbers import ImageNoise

TIMES = 12
# Of an image and noise at each timestep, at least: with few images each comes several times
DRAWS = 500


@dataclass(frozen=True)
class BandErrors:
    """Ratios at K timesteps in the bands; float64 arrays."""

    t: list[int]  # (K,)
    bands: list[str]  # "mean", "1-2", "2-4", ..., "finest", in cycles an image
    ratio: np.ndarray  # (K, bands): squared error of x_0 over that of the average image
    standard_error: np.ndarray  # (K, bands), over images
    linear: np.ndarray  # (K, bands): what the best linear filter reaches
    variance: np.ndarray  # (bands,): s^2, the squared error of the average image

    def table(self) -> str:
        """For people: a line a timestep."""
        lines = ["     t  " + "".join(f"{name:>18}" for name in self.bands)]
        for t, ratios, errors in zip(self.t, self.ratio, self.standard_error, strict=True):
            cells = (
                f"{ratio:.3g} ± {error:.1g}" for ratio, error in zip(ratios, errors, strict=True)
            )
            lines.append(f"{t:>6}  " + "".join(f"{cell:>18}" for cell in cells))
        return "\n".join(lines)

    def verdict(self) -> str:
        """What the last timestep says of an image's mean, which one sees as colour and darkness."""
        ratio, error = self.ratio[-1, 0], self.standard_error[-1, 0]
        worse = (
            f"{ratio:.3g} times worse than"
            if ratio - 2 * error > 1
            else "not measurably worse than"
        )
        return f"at t = {self.t[-1]} the model's guess of an image's mean is {worse} the average image's"

    def facts(self) -> dict:
        """Plain values, for a JSON."""
        return {
            name: value if isinstance(value, list) else value.tolist()
            for name, value in vars(self).items()
        }


@torch.no_grad()
def measure_bands(
    denoiser: Denoiser,
    x_0_of: Callable[[np.ndarray], Tensor],
    indices: np.ndarray,
    average: Tensor,
    batch_size: int,
    seed: int,
    processes: Processes = SINGLE_PROCESS,
) -> BandErrors:
    """Measure the ratios; the processes divide the timesteps among themselves, and all get the result.

    `x_0_of` makes of image indices (B,) their x_0 (B, C, H, W) in [-1, 1], on the model's device; `average` is the
    training images' (C, H, W). `UserError` for a single held-out image, as its standard error is not known.
    """
    if len(indices) < 2:
        raise UserError("bands wants two held-out images or more")
    scheduler = denoiser.scheduler
    # Of T - 1: dense at both ends (Chebyshev's)
    share = (1 - np.cos(np.pi * np.arange(TIMES) / (TIMES - 1))) / 2
    t = np.unique((share * (scheduler.timesteps - 1)).round().astype(int)).tolist()
    draws, limit = (
        math.ceil(DRAWS / len(indices)) * len(indices),
        BatchLimit(x_0_of(indices[:1]).device, batch_size),
    )
    energy = lambda images: band_means(spectrum(images).abs().square())  # (B, bands)

    def errors(some: range, t: int) -> Tensor:
        x_0 = x_0_of(indices[[j % len(indices) for j in some]])
        x_t = scheduler.q_sample(
            x_0, t, ImageNoise(seed, some, x_0.shape[1:], x_0.device, f"bands {t}").draw()
        )
        return energy(predict(denoiser, scheduler, x_t, t)[0] - x_0)

    parts = limit.in_parts(
        lambda some: energy((images := x_0_of(some)) - average.to(images.device)), indices
    )
    variance = torch.cat(parts).numpy()  # (N, bands), of each image
    table = torch.zeros(len(t), draws, variance.shape[1], dtype=torch.float64)
    with denoiser.evaluating():
        for k in tqdm(
            processes.own_range(len(t)), "bands", unit="timestep", disable=not processes.is_main
        ):
            table[k] = torch.cat(limit.in_parts(lambda some, t=t[k]: errors(some, t), range(draws)))
    # Each entry is one process's and 0 in the others, so that their sum is exact; (K, N, bands), of each image
    of_images, s2 = (
        processes.sum_(table).unflatten(1, (-1, len(indices))).mean(dim=1).numpy(),
        variance.mean(axis=0),
    )
    ratio = of_images.mean(axis=1) / s2
    # By the delta method, for a ratio of two means over the same images
    spread = error_of_mean((of_images - ratio[:, None] * variance).swapaxes(0, 1))
    a = scheduler.alphas_cumprod[t].numpy()[:, None]
    names = ["mean", *(f"{2 ** (k - 1)}-{2**k}" for k in range(1, len(s2) - 1)), "finest"]
    return BandErrors(t, names, ratio, spread / s2, (1 - a) / (a * s2 + 1 - a), s2)


def plot_bands(result: BandErrors, path: Path, title: str) -> None:
    """Save a heat map: red is worse than no knowledge, and framed where that is by more than two standard errors."""
    figure, axis = plt.subplots(figsize=(10, 1.2 + 0.55 * len(result.bands)))
    axis.imshow(
        result.ratio.T,
        cmap="RdBu_r",
        norm=LogNorm(1e-2, 1e2),
        aspect="auto",
        interpolation="nearest",
    )
    for (k, band), ratio in np.ndenumerate(result.ratio):
        dark = not 1 / 30 < ratio < 30
        axis.text(
            k,
            band,
            f"{ratio:.3g}",
            ha="center",
            va="center",
            fontsize=8,
            color="white" if dark else "black",
        )
        if ratio - 2 * result.standard_error[k, band] > 1:
            axis.add_patch(
                plt.Rectangle((k - 0.49, band - 0.48), 0.98, 0.96, fill=False, linewidth=1.5)
            )
    axis.set_xticks(range(len(result.t)), map(str, result.t))
    axis.set_yticks(range(len(result.bands)), result.bands)
    axis.set(
        xlabel="t (code)",
        ylabel="cycles an image",
        title=f"{title}: error of $x_0$ over the average image's",
    )
    figure.tight_layout()
    save_figure(figure, path)
