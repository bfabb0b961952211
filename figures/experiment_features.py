"""What figures/experiments.py compares images by, without a network from elsewhere: a feature distance, and colours.

The feature distance is the Fréchet distance (that of FID) between Gaussians fitted to features of the samples and of
all training images, mirrored ones included. The features come from no trained network: the image at 4 x 4 pixels, and
what a fixed bank of random 3 x 3 filters answers at three scales (absolute value, averaged over each quarter of the
image); each standardised, then the DIMENSIONS largest principal components of the training images' features, scaled to
variance 1. So it is in units of the training images' own variance: 0 for the same images, and about 2 x DIMENSIONS for
one image repeated. It sees colour, layout, blur and noise, and nothing of what a face is; numbers compare with each
other, at the same number of samples, and with no FID.
"""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.datasets import load_images, split_images
from data.pixels import to_model_range
from functions.support.random_numbers import generator_of

DIMENSIONS = 16
FILTERS = 16


class Data:
    """The images of a data set, as (N, 3, H, W) in [-1, 1]: training and held-out ones; `distance` to the former."""

    def __init__(self, dataset_name: str, image_size: int, split_name: str, device: torch.device):
        image_set = load_images(dataset_name, image_size, quiet=True)
        split = split_images(image_set, split_name)
        self.train, self.held_out = (
            to_model_range(torch.from_numpy(np.array(image_set.images[indices]))).to(device)
            for indices in (split.train_indices, split.val_indices)
        )
        self.features = Features(torch.cat([self.train, self.train.flip(3)]))

    def distance(self, images: Tensor) -> float:
        return self.features.distance(images)


def data_of(config: dict, device: torch.device) -> Data:
    """The data that a model was trained with; made once."""
    diffusion = config["diffusion"]
    return cached_data(diffusion["dataset_name"], config["model"]["image_size"], diffusion["split"], device)


cached_data = cache(Data)


class Features:
    """The feature distance of this module's docstring, to a set of real images (N, 3, H, W) in [-1, 1]."""

    def __init__(self, real: Tensor):
        raw = filter_answers(real)
        self.mean, self.std = raw.mean(0), raw.std(0).clamp(min=1e-6)
        standardised = (raw - self.mean) / self.std
        values, vectors = torch.linalg.eigh(standardised.T.cov())
        self.axes = vectors[:, -DIMENSIONS:] / values[-DIMENSIONS:].clamp(min=1e-9).sqrt()
        self.real = self(real)

    def __call__(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, DIMENSIONS) float64."""
        return (filter_answers(images) - self.mean) / self.std @ self.axes

    def distance(self, images: Tensor) -> float:
        return frechet_distance(self(images), self.real)


def filter_answers(images: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N, F) float64: 4 x 4 pixels, and the energy of random filters at three scales."""
    filters = torch.randn(FILTERS, 3, 3, 3, generator=generator_of("cpu", "features"), dtype=torch.float64)
    filters = filters - filters.mean((1, 2, 3), keepdim=True)  # flat grey says nothing: the pixels know that already
    filters = (filters / filters.flatten(1).norm(dim=1)[:, None, None, None]).to(images.device)
    images = images.double()
    parts = [F.adaptive_avg_pool2d(images, 4)]
    for scale in (1, 2, 4):
        answers = F.conv2d(F.avg_pool2d(images, scale), filters).abs()
        parts.append(F.adaptive_avg_pool2d(answers, 2))
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of Gaussians fitted to the rows of a and of b."""
    cov_a, cov_b = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # C_a C_b and this symmetric matrix have the same eigenvalues
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(distance.item(), 0.0)


def colours(images: Tensor, real: Tensor) -> dict[str, list[float]]:
    """Of samples against the data, for R, G, B, in units of 1/255 of the range.

    error, error_se: the samples' mean over images and pixels minus the data's, and its standard error over the samples
    (the data is what it is). spread: the standard deviation, over images, of an image's mean; the data's beside it.
    """
    means, real_means = (127.5 * x.double().mean((2, 3)) for x in (images, real))  # (N, 3)
    return {
        "error": (means.mean(0) - real_means.mean(0)).tolist(),
        "error_se": (means.std(0) / len(means) ** 0.5).tolist(),
        "spread": means.std(0).tolist(),
        "spread_of_data": real_means.std(0).tolist(),
    }


def data_numbers(data: Data, samples: int) -> dict:
    """What real images have for a distance, and what damaged ones have: the scale to read the others on."""
    order = torch.randperm(len(data.train), generator=generator_of("cpu", "halves"))
    some, others = data.train[order[:samples]], data.train[order[samples:]]
    noise = torch.randn(some.shape, generator=generator_of("cpu", "noise")).to(some.device)
    blurred = F.interpolate(F.avg_pool2d(some, 2), scale_factor=2, mode="bilinear")
    tint = torch.tensor([20 / 255, 0, -20 / 255], device=some.device).view(3, 1, 1)
    real = Features(torch.cat([others, others.flip(3)])).distance
    return {
        "training images": len(data.train), "held-out images": len(data.held_out),
        "distance": {
            f"{len(some)} training images to the others": real(some),
            "held-out images to the training images": data.distance(data.held_out),
            "the same training images, blurred": real(blurred),
            "the same, with noise of 0.1 of the range": real((some + 0.2 * noise).clamp(-1, 1)),
            "the same, red up and blue down by 10/255": real((some + tint).clamp(-1, 1)),
            "noise": real(noise.clamp(-1, 1)),
        },
    }  # fmt: skip
