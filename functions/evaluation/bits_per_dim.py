"""Measure bits per dimension: the variational bound of Ho et al. 2020 (Eq. 5) on held-out images.

    bits/dim = (L_T + sum_t L_t + L_0) / (C H W log 2)

functions/likelihood.py computes the terms. L_0 is the "distortion", and the sum of the other terms
is the "rate". An ideal code made from the model needs at most this many bits per dimension, so
lower is better.

Each L_t of each image costs a network call. So the timesteps are divided into strata of at most
`t_stride` neighbours, and one t of each stratum is drawn for each image. The estimate is unbiased,
and its standard error over images includes the noise of the draws, which are independent.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from functions.denoiser import Predictor
from functions.likelihood import bound_terms
from functions.support.errors import UserError
from functions.support.random_numbers import generator_of, image_noise


@dataclass(frozen=True)
class BoundOptions:
    """How the bound is measured."""

    # The most timesteps in a stratum, which one network call represents. With 1 all T are computed.
    t_stride: int
    # The most timesteps of an image in a forward pass.
    batch_size: int
    # The variance of p(x_{t-1} | x_t), "small" or "large".
    variance: str
    # Whether the predicted x_0 is clipped to [-1, 1], as in sampling.
    clip_x_0: bool


@dataclass(frozen=True)
class BitsPerDim:
    """The bound of N images, each from K timesteps, in bits per dimension, as float64 arrays."""

    # (K,): the number of timesteps in each stratum. The first stratum is only t = 0.
    lengths: np.ndarray
    prior: np.ndarray  # (N,): L_T
    terms: np.ndarray  # (N, K): L_t; column 0 is L_0

    def numbers(self) -> dict[str, float]:
        """Return the means over images: the bound and its standard error, and its parts."""
        bounds = self.prior + (self.terms * self.lengths).sum(axis=1)  # (N,)
        distortion = self.terms[:, 0].mean()
        return {
            "bits_per_dim": bounds.mean(),
            "standard_error": bounds.std(ddof=1) / math.sqrt(len(bounds)),
            "rate": bounds.mean() - distortion,
            "distortion": distortion,
            "prior": self.prior.mean(),
        }


def evenly_spaced(indices: np.ndarray, count: int | None) -> np.ndarray:
    """Return `count` evenly spaced indices, or all for None or a larger count."""
    count = min(count or len(indices), len(indices))
    return indices[np.arange(count) * len(indices) // count]


@torch.no_grad()
def measure_bits_per_dim(
    denoiser: Predictor,
    load: Callable[[int], tuple[Tensor, dict[str, Tensor]]],
    indices: np.ndarray,
    options: BoundOptions,
) -> BitsPerDim:
    """Measure the variational bound (Eq. 5) of the N held-out images with these indices.

    `load` maps an index to x_0 (1, C, H, W) in [-1, 1], on the model's device, and the inputs of
    its network (1, ...). Raises UserError for fewer than two images, which have no standard error.
    """
    if len(indices) < 2:
        raise UserError(f"bits/dim needs two held-out images or more; there are {len(indices)}")
    lengths = strata_lengths(denoiser.scheduler.timesteps, options.t_stride)
    results = []
    for index in tqdm(indices.tolist(), "bits/dim", unit="image"):
        x_0, inputs = load(index)
        given = denoiser.given(**inputs)
        results.append(image_terms(given, x_0, index, lengths, options))
    prior, terms = torch.stack(results, dim=1).numpy()
    # L_T of an image is the same in all columns, because it does not depend on t.
    return BitsPerDim(lengths.numpy(), prior[:, 0], terms)


def image_terms(
    denoiser: Predictor, x_0: Tensor, index: int, lengths: Tensor, options: BoundOptions
) -> Tensor:
    """Return the results (2, K) of `bound_terms` for one image, at one t of each stratum.

    The noise depends only on (index, t).
    """
    parts = []
    for t in draw_t(lengths, index).split(options.batch_size):
        noise = image_noise(0, t.tolist(), x_0.shape[1:], x_0.device, f"bits per dim/{index}")()
        t = t.to(x_0.device)
        terms = bound_terms(
            denoiser, x_0.expand_as(noise), t, noise, options.variance, options.clip_x_0
        )
        parts.append(terms.cpu())
    return torch.cat(parts, dim=1)


def strata_lengths(timesteps: int, t_stride: int) -> Tensor:
    """Divide 0 and 1 .. T-1 into strata of at most t_stride timesteps: K lengths, (K,) int64."""
    lengths = [1]
    start = 1
    while start < timesteps:
        # L_t falls roughly as 1 / t, so strata are short where t is small.
        lengths.append(min(t_stride, 1 + start // 4, timesteps - start))
        start += lengths[-1]
    return torch.tensor(lengths)


def draw_t(lengths: Tensor, index: int) -> Tensor:
    """Draw one t of each stratum, uniformly: (K,) int64, a function of the image index."""
    generator = generator_of("cpu", 0, "bits per dim t", index)
    uniform = torch.rand(len(lengths), dtype=torch.float64, generator=generator)
    first = lengths.cumsum(0) - lengths
    return first + (uniform * lengths).long()
