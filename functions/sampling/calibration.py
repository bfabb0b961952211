"""A cure without training for what a network does not know of x_0 at high t: colour, darkness, speckles.

At each timestep and in each band of spatial frequency the network's x_0 is replaced by the best linear mix of it and
x_t, about the average image mu:

    x_0' = mu + w_1 (x_0 - mu) + w_2 (x_t - sqrt(alpha_bar) mu)

Two real numbers a band and t, by least squares at some timesteps and interpolated between them. On the images that they
are fitted to they are as good as the network alone (1, 0) and as the best linear filter of x_t (0, w), or better.
docs/whole-before-detail.md says why it helps. Related, with one number a timestep: Pang et al. 2023, arXiv:2302.10688.
"""

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.pixels import to_model_range
from functions.noise_scheduler import NoiseScheduler, Timestep, broadcast
from functions.prediction import Denoiser, predict
from functions.sampling.generation import BatchLimit, ImageSampler, generate
from functions.support.checkpoint import SavedModel
from functions.support.errors import UserError
from functions.support.files import TensorFile, write_tensors
from functions.support.processes import Processes
from functions.support.random_numbers import ImageNoise, seed_of
from functions.timesteps import logsnr_timesteps

IMAGES = 512  # that the numbers are fitted to
FROM = 0.6  # as a share of T: at lower t the network knows more than the numbers could add
FITTED = 17  # timesteps from there to T - 1, evenly spaced in log-SNR
RIDGE = 1e-4  # relative: where x_0 is a multiple of x_t, one of the numbers is as good as the other

spectrum = partial(torch.fft.fft2, norm="ortho")  # in which white noise has variance 1 too


def octaves(size: int, device: torch.device | str = "cpu") -> Tensor:
    """The band of each coefficient of the spectrum of images of size x size pixels: (H, W) int64.

    Band 0 is the mean; band k has frequencies from 2^(k-1) to 2^k cycles an image. The last has all that is finer.
    """
    cycles = torch.fft.fftfreq(size, 1 / size, device=device)
    octave = 1 + torch.log2(torch.hypot(cycles[:, None], cycles).clamp(min=0.5)).floor().long()
    return octave.clamp(max=max(1, size.bit_length() - 2))


def band_means(values: Tensor) -> Tensor:
    """(B, C, H, W), a real number a coefficient -> (B, bands) float64, on the CPU: means over bands and channels."""
    bands, values = (
        octaves(values.shape[-1]).flatten(),
        values.mean(dim=1).flatten(1).cpu().double(),
    )
    return values.new_zeros(len(values), bands.max() + 1).index_add_(
        1, bands, values
    ) / torch.bincount(bands)


@dataclass(frozen=True)
class Calibration:
    """What `interpret` of functions/prediction.py calls: x_0 -> x_0'."""

    mean: Tensor  # (C, H, W): mu
    weights: Tensor  # (T, bands, 2): w_1 and w_2; 1 and 0 where nothing changes

    def __call__(self, x_0: Tensor, x_t: Tensor, t: Timestep, scheduler: NoiseScheduler) -> Tensor:
        if isinstance(t, int) and t < FROM * scheduler.timesteps:
            return x_0
        mean, bands = self.mean.to(x_0), octaves(x_0.shape[-1], x_0.device)
        of_bands = self.weights[t.to(self.weights.device) if isinstance(t, Tensor) else t].to(x_0)
        w_1, w_2 = of_bands[..., bands, :].unsqueeze(-4).unbind(-1)  # (1, H, W), or (B, 1, H, W)
        root = broadcast(scheduler.alpha_bar(t) ** 0.5, x_t)
        mixed = w_1 * spectrum(x_0 - mean) + w_2 * spectrum(x_t - root * mean)
        return mean + torch.fft.ifft2(mixed, norm="ortho").real


@torch.no_grad()
def calibrate(denoiser: Denoiser, images: Tensor, batch_size: int) -> Calibration:
    """Fit a network without calibration to images (N, C, H, W) in [-1, 1] on its device, in float32."""
    denoiser, scheduler, mean = (
        replace(denoiser, precision=torch.float32),
        denoiser.scheduler,
        images.mean(dim=0),
    )
    last, first = scheduler.timesteps - 1, round(FROM * scheduler.timesteps)
    times = logsnr_timesteps(scheduler, min(FITTED, last - first + 1), last, first)[::-1]
    limit, fitted = BatchLimit(images.device, batch_size), []

    def products(some: range, t: int) -> Tensor:
        """Of the spectra of x_0, x_t (p, q) and the true x_0 (y): (5, images, bands), pp, pq, qq, py, qy."""
        x_0, noise = (
            images[some.start : some.stop],
            ImageNoise(0, some, mean.shape, images.device, f"calibration {t}"),
        )
        x_t = scheduler.q_sample(x_0, t, noise.draw())
        seen, root = predict(denoiser, scheduler, x_t, t)[0], scheduler.alpha_bar(t) ** 0.5
        p, q, y = (spectrum(centred) for centred in (seen - mean, x_t - root * mean, x_0 - mean))
        return torch.stack(
            [band_means((a * b.conj()).real) for a, b in ((p, p), (p, q), (q, q), (p, y), (q, y))]
        )

    with denoiser.evaluating():
        for t in tqdm(times, "calibrating", unit="timestep"):
            parts = limit.in_parts(lambda some, t=t: products(some, t), range(len(images)))
            pp, pq, qq, py, qy = torch.cat(parts, dim=1).mean(dim=1)  # (bands,) each
            pp, qq = (1 + RIDGE) * pp, (1 + RIDGE) * qq
            # By Cramer's rule
            numbers = torch.stack([qq * py - pq * qy, pp * qy - pq * py], dim=-1)
            fitted.append(numbers / (pp * qq - pq**2)[:, None])
    noisiness, columns = (
        -torch.logit(scheduler.alphas_cumprod).numpy(),
        torch.stack(fitted).flatten(1).T.numpy(),
    )
    between = np.stack(
        [np.interp(noisiness[first:], noisiness[times], column) for column in columns], axis=1
    )
    weights = torch.tensor([1.0, 0.0]).repeat(scheduler.timesteps, len(fitted[0]), 1)
    weights[first:] = torch.from_numpy(between).float().unflatten(1, fitted[0].shape)
    return Calibration(mean, weights.to(mean.device))


def calibrated(
    image_sampler: ImageSampler,
    saved: SavedModel,
    batch_size: int,
    load: Callable,
    processes: Processes,
) -> ImageSampler:
    """The sampler with the calibration that its options ask for; one that was made before lies beside the checkpoint.

    "own" fits to the model's own samples, which fresh noise keeps sound, so that no data is needed. For "data" and
    other data sets `load(None or its name)` gives the ImageSet and its Split.
    """
    which, denoiser, device = (
        image_sampler.options.calibrate,
        image_sampler.denoiser,
        image_sampler.device,
    )
    # Never into others' folders
    folder = Path("samples") if saved.path.is_dir() else saved.path.parent
    path = folder / f"{saved.name}-calibration-{'own' if which == 'own' else 'data'}.safetensors"
    made_from = {"weights": saved.digest, "images": which, "fitted": [IMAGES, FROM, FITTED, RIDGE]}

    def read_or_make() -> dict[str, Tensor]:
        shapes = {"mean": saved.image_shape, "weights": (denoiser.scheduler.timesteps, bands, 2)}
        with suppress(UserError, OSError):  # of a file that is not there, or damaged
            file = TensorFile(path)
            found = file.tensors() if file.contents == made_from else {}
            if {name: (*tensor.shape,) for name, tensor in found.items()} == shapes:
                return found
        if which == "own":
            images = generate(
                image_sampler.quick(seed_of("calibration")), range(IMAGES), batch_size
            ).images
        else:
            image_set, split = load(None if which == "data" else which)
            some = split.train_indices[
                np.linspace(0, len(split.train_indices) - 1, IMAGES).astype(int)
            ]
            images = to_model_range(torch.from_numpy(image_set.images[some]))
        made = {
            name: part.cpu()
            for name, part in vars(calibrate(denoiser, images.to(device), batch_size)).items()
        }
        try:
            folder.mkdir(exist_ok=True)
            write_tensors(path, made, made_from)
            print(f"wrote {path}")
        except OSError as error:
            print(f"WARNING: the calibration is not kept: {error}", file=sys.stderr)
        return made

    if not which:
        return image_sampler
    bands = int(octaves(saved.image_shape[-1]).max()) + 1
    parts = {name: part.to(device) for name, part in processes.from_main(read_or_make).items()}
    return replace(image_sampler, denoiser=replace(denoiser, calibration=Calibration(**parts)))
