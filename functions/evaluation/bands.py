"""What a network knows of x_0 at each timestep, by spatial frequency: `python evaluate.py --metrics bands`.

For held-out images, the squared error of the network's x_0 (unclipped) over that of the average training image, in an
image's mean and in each octave of frequencies (functions/spectrum.py). 1 is no knowledge at all, and above 1 is a
fault. The best linear filter of x_t reaches (1 - a) / (a s^2 + 1 - a) with a = alpha_bar_t, and s^2 the squared error
of the average image for each coefficient of the orthonormal transform, in which the noise has 1.
docs/whole-before-detail.md explains what it is good for.
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
from functions.sampling.generation import BatchLimit
from functions.spectrum import band_means, band_names, spectrum
from functions.support.pictures import plt, save_figure
from functions.support.processes import SINGLE_PROCESS, Processes
from functions.support.random_numbers import ImageNoise

TIMES = 12
DRAWS = 500  # of an image and noise at each timestep, at least: with few images each comes several times


@dataclass(frozen=True)
class BandErrors:
    """Ratios at K timesteps in the bands; float64 arrays."""

    times: list[int]  # (K,), code t
    names: list[str]  # of the bands
    ratio: np.ndarray  # (K, bands): squared error of x_0 over that of the average image
    standard_error: np.ndarray  # (K, bands), over images
    linear: np.ndarray  # (K, bands): what the best linear filter reaches
    variance: np.ndarray  # (bands,): s^2, the squared error of the average image

    def table(self) -> str:
        """For people: a line a timestep."""
        lines = ["     t  " + "".join(f"{name:>18}" for name in self.names)]
        for t, ratios, errors in zip(self.times, self.ratio, self.standard_error, strict=True):
            cells = (f"{ratio:.3g} ± {error:.1g}" for ratio, error in zip(ratios, errors, strict=True))
            lines.append(f"{t:>6}  " + "".join(f"{cell:>18}" for cell in cells))
        return "\n".join(lines)

    def verdict(self) -> str:
        """What the last timestep says of an image's mean, which one sees as colour and darkness."""
        t, ratio, error = self.times[-1], self.ratio[-1, 0], self.standard_error[-1, 0]
        if ratio - 2 * error <= 1:
            return f"at t = {t} the model's guess of an image's mean is no worse than the average image's"
        return f"at t = {t} the model's guess of an image's mean is {ratio:.3g} times worse than the average image's"

    def facts(self) -> dict:
        """Plain values, for a JSON."""
        arrays = {name: getattr(self, name) for name in ("ratio", "standard_error", "linear", "variance")}
        return {"t": self.times, "bands": self.names, **{name: array.tolist() for name, array in arrays.items()}}


def times_of(timesteps: int) -> list[int]:
    """Some timesteps from 0 to T - 1, dense at both ends (Chebyshev's)."""
    share = (1 - np.cos(np.pi * np.arange(TIMES) / (TIMES - 1))) / 2
    return sorted({round(value * (timesteps - 1)) for value in share.tolist()})


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
    """Measure the ratios.

    Args:
        x_0_of: image indices (B,) -> (B, C, H, W) in [-1, 1], on the model's device.
        indices: the held-out images, at least two, or there is no standard error.
        average: (C, H, W): the average training image.
        processes: those that divide the timesteps among themselves; all get the result.
    """
    scheduler, times, device = denoiser.scheduler, times_of(denoiser.scheduler.timesteps), x_0_of(indices[:1]).device
    average = average.to(device)
    draws = math.ceil(DRAWS / len(indices)) * len(indices)
    energy = lambda images: band_means(spectrum(images).abs().square()).mean(dim=1)
    limit = BatchLimit(device, batch_size)

    def errors(some: range, t: int) -> Tensor:
        x_0 = x_0_of(indices[[j % len(indices) for j in some]])
        noise = ImageNoise(seed, some, x_0.shape[1:], x_0.device, f"bands {t}").draw()
        return energy(predict(denoiser, scheduler, scheduler.q_sample(x_0, t, noise), t)[0] - x_0).cpu()

    own = list(processes.own_range(len(times)))
    variance = torch.cat(limit.in_parts(lambda some: energy(x_0_of(some) - average).cpu(), indices))
    table = torch.zeros(len(times), draws, variance.shape[1], dtype=torch.float64)
    with denoiser.evaluating():
        for k in tqdm(own, "bands", unit="timestep", disable=not processes.is_main):
            table[k] = torch.cat(limit.in_parts(lambda some, t=times[k]: errors(some, t), range(draws)))
    # Each entry is one process's and 0 in the others, so that their sum is exact; (K, N, bands), of each image
    of_images = processes.sum_(table).unflatten(1, (-1, len(indices))).mean(dim=1).numpy()
    variance, all_of = variance.numpy(), variance.numpy().mean(axis=0)
    ratio = of_images.mean(axis=1) / all_of
    # By the delta method, for a ratio of two means over the same images
    spread = np.stack([error_of_mean(row - r * variance) for row, r in zip(of_images, ratio, strict=True)])
    a = scheduler.alphas_cumprod[times].numpy()[:, None]
    linear = (1 - a) / (a * all_of + 1 - a)
    return BandErrors(times, band_names(average.shape[-1]), ratio, spread / all_of, linear, all_of)


def plot_bands(result: BandErrors, path: Path, title: str) -> None:
    """Save a heat map: red is worse than no knowledge; the black line is at 1, give or take two standard errors."""
    figure, axis = plt.subplots(figsize=(10, 1.2 + 0.55 * len(result.names)))
    axis.imshow(result.ratio.T, cmap="RdBu_r", norm=LogNorm(1e-2, 1e2), aspect="auto", interpolation="nearest")
    for (k, band), ratio in np.ndenumerate(result.ratio):
        dark = not 1 / 30 < ratio < 30
        axis.text(k, band, f"{ratio:.2g}", ha="center", va="center", fontsize=8, color="white" if dark else "black")
    fault = np.nan_to_num(result.ratio - 2 * result.standard_error, nan=0).T > 1
    fine = np.kron(fault, np.ones((20, 20)))  # so that the contour follows the cells
    if fault.any() and not fault.all():
        y, x = [(np.arange(count) + 0.5) / 20 - 0.5 for count in fine.shape]
        axis.contour(x, y, fine, levels=[0.5], colors="black", linewidths=1.5)
    axis.set_xticks(range(len(result.times)), map(str, result.times))
    axis.set_yticks(range(len(result.names)), result.names)
    axis.set(xlabel="t (code)", ylabel="cycles an image", title=f"{title}: error of $x_0$ over the average image's")
    figure.tight_layout()
    save_figure(figure, path)
