"""Bits per dimension: the variational bound of Ho et al. 2020 (Eq. 5) on held-out images.

    bits/dim = (L_T + sum_t L_t + L_0) / (C H W log 2)

The terms are those of `functions.likelihood`; "rate" is all but L_0, and L_0 the "distortion", in bits. It is an upper
bound of the bits that an ideal code made from the model needs for an image, so lower is better.

Every L_t of every image costs a network call, so `t_stride` takes one t of each stratum of neighbours, drawn for each
image by itself: unbiased, and the standard error over images, which are then independent, includes what that adds.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from functions.likelihood import VARIANCES, terms_of
from functions.prediction import Denoiser
from functions.support.processes import SINGLE_PROCESS, Processes
from functions.support.random_numbers import generator_of


@dataclass(frozen=True)
class BitsPerDim:
    """The bound of N images at K timesteps each, in bits per dimension; float64 arrays."""

    strata: list[range]  # K of them, together 0 .. T-1; the first is t = 0
    t: np.ndarray  # (N, K) int64: the timestep of each image in each stratum
    prior: np.ndarray  # (N,): L_T
    terms: np.ndarray  # (N, K): L_t; column 0 is L_0
    mse_x_0: np.ndarray  # (N, K): squared error of the (clipped) prediction of x_0, images in [-1, 1]
    mse_eps: np.ndarray  # (N, K): squared error of the predicted noise, which training minimises

    @property
    def lengths(self) -> np.ndarray:
        """(K,): how many timesteps each stratum stands for."""
        return np.array([len(stratum) for stratum in self.strata])

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
        return float(self.of_images.std(ddof=1) / math.sqrt(len(self.prior))) if len(self.prior) > 1 else math.nan

    @property
    def distortion(self) -> float:
        """L_0, in bits: what the decoder adds so that the image is exact."""
        return float(self.terms[:, 0].mean())

    @property
    def rate(self) -> float:
        """All but L_0."""
        return self.total - self.distortion

    def curves(self) -> dict[str, list[float]]:
        """What the figure shows, for each stratum, small t first; means over images.

        `rate` and `rmse` are the rate-distortion curve of the paper's Figure 5: what a receiver has read when x_t is
        known, L_T and all terms above t (in the middle of a stratum: half of its own), and how far the x_0 that is
        predicted then is from the truth, in levels of 0 .. 255.
        """
        terms, lengths = self.terms.mean(axis=0), self.lengths
        above = np.cumsum((terms * lengths)[::-1])[::-1] - terms * lengths
        mse = self.mse_x_0.mean(axis=0)
        columns = {
            "t": [(stratum[0] + stratum[-1]) / 2 for stratum in self.strata], "timesteps": lengths,
            "bits_per_dim_a_step": terms, "standard_error": spread(self.terms), "mse_x_0": mse,
            "mse_eps": self.mse_eps.mean(axis=0), "rate": self.prior.mean() + above + terms * (lengths - 1) / 2,
            "rmse": 127.5 * np.sqrt(mse),
        }  # fmt: skip
        return {name: [float(value) for value in column] for name, column in columns.items()}

    def facts(self) -> dict:
        """Plain values, for a JSON. Bits per dimension; a standard error is null when there is but one image."""
        finite = lambda value: None if math.isnan(value) else value
        curves = {name: [finite(value) for value in column] for name, column in self.curves().items()}
        return {
            "bits_per_dim": self.total, "standard_error": finite(self.standard_error), "rate": self.rate,
            "distortion": self.distortion, "prior": float(self.prior.mean()), "images": len(self.prior),
            "network_calls_an_image": len(self.strata), "curves": curves,
        }  # fmt: skip


def spread(values: np.ndarray) -> np.ndarray:
    """(N, K) -> (K,): the standard error of the mean over N; nan for N = 1."""
    count = len(values)
    return values.std(axis=0, ddof=1) / math.sqrt(count) if count > 1 else np.full(values.shape[1], math.nan)


@torch.no_grad()
def measure_bits_per_dim(
    denoiser: Denoiser,
    x_0_of: Callable[[np.ndarray], Tensor],
    indices: np.ndarray,
    t_stride: int = 1,
    images: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    variance: str = "small",
    clip_x_0: bool = True,
    processes: Processes = SINGLE_PROCESS,
    progress: bool = False,
) -> BitsPerDim:
    """The variational bound (Eq. 5) of held-out images.

    The noise of a term depends on (seed, image, t) alone, and batches are the same whoever computes them, so the result
    depends neither on the number of processes nor on chance.

    Args:
        x_0_of: image indices (B,) -> (B, C, H, W) in [-1, 1], on the model's device.
        indices: the held-out images, at least one.
        t_stride: the most timesteps that one call stands for; 1: all T, without an error from t.
        images: how many of them, evenly spaced; None: all.
        batch_size: (image, t) pairs in a forward pass.
        variance: of p, "small" or "large".
        clip_x_0: clip the predicted x_0 to [-1, 1], as samplers do.
        processes: those that share the work; all get the result.
        progress: show a bar over all pairs.

    Raises:
        ValueError: no image, or an unknown variance.
    """
    if len(indices) == 0 or variance not in VARIANCES:
        raise ValueError(f"{len(indices)} images and variance {variance!r}; there must be images, and small or large")
    count = min(images or len(indices), len(indices))
    chosen = np.asarray(indices)[np.arange(count) * len(indices) // count]
    scheduler = denoiser.scheduler
    strata = strata_of(scheduler.timesteps, t_stride)
    t = torch.tensor([choose_t(strata, seed, int(image)) for image in chosen])  # (N, K)

    image_of, t_of = np.repeat(chosen, len(strata)), t.flatten()  # the pairs, image by image
    table = torch.zeros(4, len(t_of), dtype=torch.float64)
    starts = range(0, len(t_of), batch_size)[processes.rank :: processes.count]
    bar = tqdm(total=len(starts), unit="batch", desc="bits/dim", disable=not progress, dynamic_ncols=True)
    with bar, denoiser.evaluating():
        for start in starts:
            pairs = slice(start, start + batch_size)
            x_0 = x_0_of(image_of[pairs])
            noise = torch.stack([
                torch.randn(x_0.shape[1:], generator=generator_of("cpu", seed, "bits per dim", *pair))
                for pair in zip(image_of[pairs].tolist(), t_of[pairs].tolist(), strict=True)
            ])  # fmt: skip
            table[:, pairs] = terms_of(denoiser, scheduler, x_0, t_of[pairs], noise, variance, clip_x_0).cpu()
            bar.update()
    # Each entry is one process's and 0 in the others, so that their sum is exact
    prior, terms, mse_x_0, mse_eps = processes.sum_(table).view(4, *t.shape).numpy()
    return BitsPerDim(strata, t.numpy(), prior[:, 0], terms, mse_x_0, mse_eps)


def strata_of(timesteps: int, t_stride: int) -> list[range]:
    """Cut 0 .. T-1 into strata of at most t_stride: t = 0 by itself, then short ones where terms change fast.

    L_t falls about as 1 / t, so a stratum is no longer than a quarter of its first t (and one).
    """
    strata, start = [range(0, 1)], 1
    while start < timesteps:
        stop = min(start + min(t_stride, 1 + start // 4), timesteps)
        strata.append(range(start, stop))
        start = stop
    return strata


def choose_t(strata: list[range], seed: int, image: int) -> list[int]:
    """One t of each stratum, uniformly, by (seed, image) alone: other images take others."""
    shares = torch.rand(len(strata), dtype=torch.float64, generator=generator_of("cpu", seed, "bits per dim t", image))
    return [stratum[int(share * len(stratum))] for stratum, share in zip(strata, shares.tolist(), strict=True)]
