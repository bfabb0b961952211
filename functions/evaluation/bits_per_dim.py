"""Bits per dimension: the variational bound of Ho et al. 2020 (Eq. 5) on held-out images.

    bits/dim = (L_T + sum_t L_t + L_0) / (C H W log 2)

The terms are those of `functions.likelihood`; "rate" is all but L_0, and L_0 the "distortion", in bits. The sum is an
upper bound of the bits that an ideal code made from the model needs for an image, so lower is better.

Every L_t of every image costs a network call, so `t_stride` takes one t of each stratum of neighbours, at random for
each image. That is unbiased, and the images stay independent, so their standard error includes what it adds.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from functions.likelihood import VARIANCES, terms_of
from functions.prediction import Denoiser
from functions.sampling.generation import BatchLimit, batches_of
from functions.support.pictures import plt, save_figure
from functions.support.processes import SINGLE_PROCESS, Processes
from functions.support.random_numbers import generator_of


@dataclass(frozen=True)
class BoundOptions:
    """How the bound is measured."""

    # The most timesteps that one network call stands for; 1: all T, without an error from t
    t_stride: int = 1
    batch_size: int = 64  # (image, t) pairs in a forward pass
    seed: int = 0
    variance: str = "small"  # of p(x_{t-1} | x_t), or "large"
    clip_x_0: bool = True  # clip the predicted x_0 to [-1, 1], as samplers do


@dataclass(frozen=True)
class BitsPerDim:
    """The bound of N images at K timesteps each, in bits per dimension; float64 arrays."""

    # (K,): how many timesteps each stratum stands for; the first is t = 0 alone
    lengths: np.ndarray
    prior: np.ndarray  # (N,): L_T
    terms: np.ndarray  # (N, K): L_t; column 0 is L_0
    # (N, K): squared error of the (clipped) prediction of x_0, images in [-1, 1]
    mse_x_0: np.ndarray

    @property
    def of_images(self) -> np.ndarray:
        """(N,): each image's bound."""
        return self.prior + (self.terms * self.lengths).sum(axis=1)

    @property
    def total(self) -> float:
        """The mean over images."""
        return float(self.of_images.mean())

    @property
    def standard_error(self) -> float:
        """Of `total`, over images and the choice of t; nan for a single image."""
        return float(error_of_mean(self.of_images))

    @property
    def distortion(self) -> float:
        """L_0, in bits: what the decoder adds so that the image is exact."""
        return float(self.terms[:, 0].mean())

    @property
    def rate(self) -> float:
        """All but L_0."""
        return self.total - self.distortion

    def curves(self) -> dict[str, list[float]]:
        """What the figure shows, and the error of x_0, for each stratum, small t first; means over images.

        `rate` and `rmse` are the rate-distortion curve of the paper's Figure 5: what a receiver has read when x_t is
        known, L_T and all terms above t (in the middle of a stratum: half of its own), and how far the x_0 that is
        predicted then is from the truth, in levels of 0 .. 255.
        """
        terms, lengths, mse = self.terms.mean(axis=0), self.lengths, self.mse_x_0.mean(axis=0)
        above = np.cumsum((terms * lengths)[::-1])[::-1] - terms * lengths
        rate = self.prior.mean() + above + terms * (lengths - 1) / 2
        t, error = np.cumsum(lengths) - (lengths + 1) / 2, error_of_mean(self.terms)
        of_terms = {
            "t": t,
            "timesteps": lengths,
            "bits_per_dim_a_step": terms,
            "standard_error": error,
        }
        of_errors = {"mse_x_0": mse, "rate": rate, "rmse": 127.5 * np.sqrt(mse)}
        return {
            name: [float(value) for value in column]
            for name, column in (of_terms | of_errors).items()
        }

    def facts(self) -> dict:
        """Plain values, for a JSON. Bits per dimension; a standard error is null when there is but one image."""
        curves, error = self.curves(), self.standard_error
        if math.isnan(error):
            error, curves["standard_error"] = None, [None] * len(self.lengths)
        sums = {
            "bits_per_dim": self.total,
            "standard_error": error,
            "rate": self.rate,
            "distortion": self.distortion,
        }
        counts = {"images": len(self.prior), "network_calls_an_image": len(self.lengths)}
        return {**sums, "prior": float(self.prior.mean()), **counts, "curves": curves}


def error_of_mean(values: np.ndarray) -> np.ndarray:
    """Standard error of the mean, (N, ...) -> (...); nan for N = 1."""
    count = len(values)
    return (
        values.std(axis=0, ddof=1) / math.sqrt(count)
        if count > 1
        else np.full(values.shape[1:], math.nan)
    )


def evenly(indices: np.ndarray, count: int | None) -> np.ndarray:
    """Take `count` of the indices, evenly spaced; all with None, or when there are no more."""
    count = min(count or len(indices), len(indices))
    return indices[np.arange(count) * len(indices) // max(count, 1)]


@torch.no_grad()
def measure_bits_per_dim(
    denoiser: Denoiser,
    x_0_of: Callable[[np.ndarray], Tensor],
    indices: np.ndarray,
    options: BoundOptions,
    processes: Processes = SINGLE_PROCESS,
    progress: bool = False,
) -> BitsPerDim:
    """Measure the variational bound (Eq. 5) of held-out images; the processes divide the batches, all get the result.

    `x_0_of` makes of image indices (B,) the x_0 (B, C, H, W) in [-1, 1], on the model's device. The noise of a term
    depends on (seed, image, t) alone, and batches are the same whoever computes them, so the result depends neither on
    the number of processes nor on chance. A batch that does not fit in memory is halved; UserError when a single image
    does not, and ValueError without an image or for an unknown variance.
    """
    if len(indices) == 0 or options.variance not in VARIANCES:
        raise ValueError(
            f"{len(indices)} images and variance {options.variance!r}; there must be some, small or large"
        )
    scheduler, seed = denoiser.scheduler, options.seed
    strata = strata_of(scheduler.timesteps, options.t_stride)
    t = torch.tensor([choose_t(strata, seed, int(image)) for image in indices])  # (N, K)
    image_of, t_of = np.repeat(indices, len(strata)), t.flatten()  # the pairs, image by image
    table = torch.zeros(3, len(t_of), dtype=torch.float64)

    def fill(pairs: range) -> None:
        x_0, t_of_pairs = x_0_of(image_of[pairs.start : pairs.stop]), t_of[pairs.start : pairs.stop]
        generators = [
            generator_of("cpu", seed, "bits per dim", int(image_of[k]), int(t_of[k])) for k in pairs
        ]
        noise = torch.stack(
            [torch.randn(x_0.shape[1:], generator=generator) for generator in generators]
        )
        terms = terms_of(
            denoiser, scheduler, x_0, t_of_pairs, noise, options.variance, options.clip_x_0
        )
        table[:, pairs.start : pairs.stop] = terms.cpu()

    own = batches_of(range(len(t_of)), options.batch_size)[processes.rank :: processes.count]
    limit = BatchLimit(x_0_of(image_of[:1]).device)
    with denoiser.evaluating():
        for pairs in tqdm(own, "bits/dim", unit="batch", disable=not progress):
            limit.in_parts(fill, pairs)
    # Each entry is one process's and 0 in the others, so that their sum is exact
    prior, terms, mse_x_0 = processes.sum_(table).view(3, *t.shape).numpy()
    return BitsPerDim(np.array([*map(len, strata)]), prior[:, 0], terms, mse_x_0)


def strata_of(timesteps: int, t_stride: int) -> list[range]:
    """Cut 0 .. T-1 into strata of at most t_stride: t = 0 by itself, then short ones where terms change fast.

    L_t falls about as 1 / t, so a stratum is no longer than a quarter of its first t (and one).
    """
    strata = [range(0, 1)]
    while (start := strata[-1].stop) < timesteps:
        strata.append(range(start, min(start + min(t_stride, 1 + start // 4), timesteps)))
    return strata


def choose_t(strata: list[range], seed: int, image: int) -> list[int]:
    """Draw one t of each stratum, uniformly, by (seed, image) alone: other images take others."""
    uniform = torch.rand(
        len(strata),
        dtype=torch.float64,
        generator=generator_of("cpu", seed, "bits per dim t", image),
    )
    return [
        stratum[int(u * len(stratum))] for stratum, u in zip(strata, uniform.tolist(), strict=True)
    ]


def plot_bits_per_dim(result: BitsPerDim, path: Path, title: str) -> None:
    """Save two panels: the terms by t, and the rate-distortion curve (the paper's Figure 5)."""
    curves = result.curves()
    t = [value + 1 for value in curves["t"]]  # the paper's, from 1, for the logarithmic axis
    figure, (terms, rate) = plt.subplots(1, 2, figsize=(9, 4))
    terms.loglog(t, curves["bits_per_dim_a_step"], marker=".", color="tab:blue")
    terms.set(xlabel="t (the paper's)", ylabel="bits/dim in one step", title="terms of the bound")
    rate.plot(curves["rate"], curves["rmse"], marker=".", color="tab:blue")
    rate.set(
        xlabel="rate so far, bits/dim", ylabel="RMSE of $x_0$, of 255", title="rate and distortion"
    )
    rate.set(xlim=(0, 1.03 * result.rate), ylim=(0, None))
    for axis in (terms, rate):
        axis.grid(color="0.92")
    sums = (
        f"{result.total:.3f} bits/dim = rate {result.rate:.3f} + distortion {result.distortion:.3f}"
    )
    figure.suptitle(f"{title}: {sums}", fontsize=11)
    figure.tight_layout()
    save_figure(figure, path)
