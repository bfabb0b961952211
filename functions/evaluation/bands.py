"""What a network knows of x_0 at each timestep, by spatial frequency.

    python evaluate.py --metrics bands

The measure is the squared error of the network's x_0 (unclipped) for held-out images over the
squared error of the average training image, in an image's mean and in each octave of frequencies.
A ratio of 1 is no knowledge at all, and a ratio above 1 is a fault.

The best linear filter of x_t reaches (1 - a) / (a s^2 + 1 - a) with a = alpha_bar_t. Here s^2 is
the squared error of the average image for each coefficient of the orthonormal transform, in which
the noise has 1. docs/whole-before-detail.md says what the measure is for.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
# Each timestep gets at least so many draws of an image and noise. With few held-out images, each
# image comes several times.
DRAWS = 500


@dataclass(frozen=True)
class BandErrors:
    """Ratios at K timesteps in the bands; float64 arrays."""

    t: list[int]  # (K,)
    # The names are "mean", "1-2", "2-4", ..., "finest"; the numbers are cycles an image.
    bands: list[str]
    # (K, bands): the squared error of the network's x_0 over that of the average image.
    ratio: np.ndarray
    # (K, bands): the standard error of `ratio`, over images.
    standard_error: np.ndarray
    # (K, bands): the ratio that the best linear filter reaches.
    linear: np.ndarray
    # (bands,): s^2, the squared error of the average image.
    variance: np.ndarray

    def table(self) -> str:
        """Return the ratios as text for people, a line a timestep."""
        lines = ["     t  " + "".join(f"{name:>18}" for name in self.bands)]
        for t, ratios, errors in zip(self.t, self.ratio, self.standard_error, strict=True):
            line = f"{t:>6}  "
            for ratio, error in zip(ratios, errors, strict=True):
                cell = f"{ratio:.3g} ± {error:.1g}"
                line += f"{cell:>18}"
            lines.append(line)
        return "\n".join(lines)

    def verdict(self) -> str:
        """Say in a sentence how well the last timestep's x_0 knows the mean of an image."""
        # People see an image's mean as its colour and darkness.
        ratio = self.ratio[-1, 0]
        comparison = "not measurably worse than"
        if ratio - 2 * self.standard_error[-1, 0] > 1:
            comparison = f"{ratio:.3g} times worse than"
        guess = f"at t = {self.t[-1]} the model's guess of an image's mean"
        return f"{guess} is {comparison} the average image's"

    def facts(self) -> dict:
        """Return plain values, for a JSON."""
        return {name: np.asarray(value).tolist() for name, value in vars(self).items()}


@torch.no_grad()
def measure_bands(
    denoiser: Denoiser,
    load_x_0: Callable[[np.ndarray], Tensor],
    indices: np.ndarray,
    average: Tensor,
    batch_size: int,
    seed: int,
    processes: Processes = SINGLE_PROCESS,
) -> BandErrors:
    """Measure, at some timesteps and in each band, the network's error over the average image's.

    The processes share the timesteps, and all of them get the result.

    `load_x_0` takes image indices (B,) and returns x_0 (B, C, H, W) in [-1, 1], on the model's
    device.
    `average` is the average of the training images (C, H, W). Raises `UserError` for a single
    held-out image, as its standard error is not known.
    """
    if len(indices) < 2:
        raise UserError("bands wants two held-out images or more")
    scheduler = denoiser.scheduler
    limit = BatchLimit(load_x_0(indices[:1]).device, batch_size)
    average = average.to(limit.device)

    # (N, bands): the squared error of the average image for each held-out image.
    parts = limit.in_parts(lambda batch: band_energy(load_x_0(batch) - average), indices)
    of_average = torch.cat(parts).numpy()

    # The draws go through all images several times, so every image comes equally often.
    image_of = np.tile(indices, math.ceil(DRAWS / len(indices)))

    def network_errors(t, draws):
        """Return the squared errors of the network's x_0 in these draws at t: (B, bands)."""
        x_0 = load_x_0(image_of[draws])
        noise = ImageNoise(seed, draws, x_0.shape[1:], x_0.device, f"bands {t}").draw()
        x_t = scheduler.q_sample(x_0, t, noise)
        predicted, _ = predict(denoiser, scheduler, x_t, t)
        return band_energy(predicted - x_0)

    times = measured_timesteps(scheduler.timesteps)
    table = torch.zeros(len(times), len(image_of), of_average.shape[1], dtype=torch.float64)
    rows = processes.shard(len(times))
    with denoiser.evaluating():
        for k in tqdm(rows, "bands", unit="timestep", disable=not processes.is_main):
            parts = limit.in_parts(partial(network_errors, times[k]), range(len(image_of)))
            table[k] = torch.cat(parts)

    # Each entry is one process's and 0 in the others, so the sum over processes is exact.
    table = processes.sum_(table)
    # Each image is averaged over its draws: (K, draws, bands) becomes (K, N, bands).
    of_network = table.unflatten(1, (-1, len(indices))).mean(dim=1).numpy()
    alpha_bar = scheduler.alphas_cumprod[times].numpy()
    return compare_errors(times, of_network, of_average, alpha_bar)


def measured_timesteps(timesteps: int) -> list[int]:
    """Return TIMES timesteps of 0 .. T-1 or, for small T, fewer.

    They are Chebyshev's points, which are dense at both ends.
    """
    share = (1 - np.cos(np.linspace(0, np.pi, TIMES))) / 2
    t = (share * (timesteps - 1)).round().astype(int)
    return np.unique(t).tolist()


def band_energy(images: Tensor) -> Tensor:
    """Return the mean square of the spectrum of (B, C, H, W) in each band: (B, bands)."""
    return band_means(spectrum(images).abs().square())


def compare_errors(
    t: list[int], of_network: np.ndarray, of_average: np.ndarray, alpha_bar: np.ndarray
) -> BandErrors:
    """Divide the network's squared errors (K, N, bands) by the average image's (N, bands).

    `alpha_bar` (K,) has the value at each timestep in t.
    """
    s2 = of_average.mean(axis=0)
    ratio = of_network.mean(axis=1) / s2

    # Both means are over the same images, so the delta method gives the error of their ratio.
    residuals = of_network - ratio[:, None] * of_average
    standard_error = error_of_mean(residuals.swapaxes(0, 1)) / s2

    # The best linear filter of x_t leaves this share of the average image's error.
    a = alpha_bar[:, None]
    linear = (1 - a) / (a * s2 + 1 - a)
    octaves = [f"{2 ** (k - 1)}-{2**k}" for k in range(1, len(s2) - 1)]
    return BandErrors(t, ["mean", *octaves, "finest"], ratio, standard_error, linear, s2)


def plot_bands(result: BandErrors, path: Path, title: str) -> None:
    """Save a heat map in which red is worse than no knowledge.

    A cell has a frame where its ratio is above 1 by more than two standard errors.
    """
    figure, axis = plt.subplots(figsize=(10, 1.2 + 0.55 * len(result.bands)))
    axis.imshow(
        result.ratio.T,
        cmap="RdBu_r",
        norm=LogNorm(1e-2, 1e2),
        aspect="auto",
        interpolation="nearest",
    )
    for (k, band), ratio in np.ndenumerate(result.ratio):
        # Cells at both ends of the scale are dark, so their text is white.
        color = "black" if 1 / 30 < ratio < 30 else "white"
        axis.text(k, band, f"{ratio:.3g}", ha="center", va="center", fontsize=8, color=color)
        if ratio - 2 * result.standard_error[k, band] > 1:
            corner = (k - 0.49, band - 0.48)
            axis.add_patch(plt.Rectangle(corner, 0.98, 0.96, fill=False, linewidth=1.5))
    axis.set_xticks(range(len(result.t)), map(str, result.t))
    axis.set_yticks(range(len(result.bands)), result.bands)
    axis.set(
        xlabel="t (code)",
        ylabel="cycles an image",
        title=f"{title}: error of $x_0$ over the average image's",
    )
    figure.tight_layout()
    save_figure(figure, path)
