"""Correct the x_0 that a trained network predicts at high t, without training it further.

Errors at high t make samples dark, speckled or wrongly coloured. In each band of spatial
frequencies, the network's x_0 is replaced by the best linear combination of x_0 and x_t, relative
to the mean image mu:

    x_0' = mu + w_1 (x_0 - mu) + w_2 (x_t - sqrt(alpha_bar) mu)

Each band has two real weights at each timestep. They are fitted by least squares at some timesteps
and interpolated in between. The network's x_0 is the combination with (w_1, w_2) = (1, 0), and the
best linear filter of x_t is one with (0, w). So on the images of the fit, the result is at least as
good as both. docs/whole-before-detail.md explains why this helps. Pang et al. 2023,
arXiv:2302.10688, use a single factor for each timestep.
"""

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.datasets import ImageSet, Split
from data.pixels import to_model_range
from functions.denoiser import Denoiser, clipped
from functions.noise_scheduler import NoiseScheduler, Timestep, broadcast
from functions.sampling.generation import ImageSampler, batches_of, generate
from functions.support.checkpoint import SavedModel, TensorFile, write_tensors
from functions.support.errors import UserError
from functions.support.files import sha256
from functions.support.loading import load_and_split
from functions.support.random_numbers import ImageNoise, seed_of
from functions.timesteps import logsnr_timesteps

# The weights are fitted to this many images.
IMAGE_COUNT = 512
# Timesteps from this fraction of T upwards are calibrated. At lower t no combination improves on
# the network.
CALIBRATED_FROM = 0.6
# The weights are fitted at this many calibrated timesteps, evenly spaced in log-SNR.
TIMESTEP_COUNT = 17
# The fit multiplies the squares pp and qq by 1 + RIDGE. Without this factor the solution would not
# be unique where x_0 is a multiple of x_t.
RIDGE = 1e-4
# It loads the data set and its split.
Load = Callable[[], tuple[ImageSet, Split]]
# The tensors have this part's name in their file.
PART = "calibration"

# With this norm the spectrum of standard normal noise also has variance 1.
spectrum = partial(torch.fft.fft2, norm="ortho")


def octaves(size: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the band of each coefficient in the spectrum of a square image: (size, size) int64.

    Band 0 is the mean. Band k has frequencies from 2^(k-1) to 2^k cycles per image. The last band
    also has all higher frequencies.
    """
    cycles = torch.fft.fftfreq(size, 1 / size, device=device)
    frequencies = torch.hypot(cycles[:, None], cycles)
    # The mean has frequency 0. It counts as half a cycle, which is one octave below band 1.
    octave = 1 + torch.log2(frequencies.clamp(min=0.5)).floor().long()
    return octave.clamp(max=max(1, size.bit_length() - 2))


def band_means(values: Tensor) -> Tensor:
    """Average real values, one per coefficient of (B, C, H, W) spectra, over bands and channels.

    Returns (B, bands) in float64, on the CPU.
    """
    bands = octaves(values.shape[-1]).flatten()
    values = values.mean(dim=1).flatten(1).cpu().double()
    sums = values.new_zeros(len(values), bands.max() + 1).index_add_(1, bands, values)
    return sums / torch.bincount(bands)


@dataclass(frozen=True)
class Calibration:
    """A correction that replaces x_0 by x_0'.

    The tensors are float32, on the device of x_0.
    """

    # mu (C, H, W)
    mean: Tensor
    # w_1 and w_2 (T, bands, 2). They are 1 and 0 at timesteps that are not calibrated.
    weights: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Return both by name."""
        return {"mean": self.mean, "weights": self.weights}

    @cached_property
    def changes(self) -> list[bool]:
        """Return, for each t, whether a weight differs from 1 and 0, which change nothing."""
        return (self.weights.cpu() != torch.tensor([1.0, 0.0])).any(dim=(1, 2)).tolist()

    def apply(self, x_0: Tensor, x_t: Tensor, t: Timestep, scheduler: NoiseScheduler) -> Tensor:
        """Return x_0' for the network's x_0 at (x_t, t): (B, C, H, W)."""
        bands = octaves(x_0.shape[-1], x_0.device)
        # The weights of the bands are (bands, 2), or (B, bands, 2) if each image has its own t.
        # Each coefficient gets the weights of its band. So w_1 and w_2 are (1, H, W) or
        # (B, 1, H, W), and all channels share them.
        weights = self.weights[t][..., bands, :]
        w_1, w_2 = weights.unsqueeze(-4).unbind(-1)
        root = broadcast(scheduler.alpha_bar(t) ** 0.5, x_t)
        mixed = w_1 * spectrum(x_0 - self.mean) + w_2 * spectrum(x_t - root * self.mean)
        return self.mean + torch.fft.ifft2(mixed, norm="ortho").real


@dataclass(frozen=True)
class Calibrated:
    """A denoiser whose x_0 is corrected by a calibration that was fitted to it."""

    denoiser: Denoiser
    fit: Calibration

    @property
    def scheduler(self) -> NoiseScheduler:
        return self.denoiser.scheduler

    def predict(self, x_t: Tensor, t: Timestep, clip_x_0: bool = False) -> tuple[Tensor, Tensor]:
        """Return the corrected x_0 and its eps at (x_t, t), as `Denoiser.predict` does."""
        x_0, eps = self.denoiser.predict(x_t, t)
        # Where the weights are 1 and 0, the transforms would only add rounding errors.
        if not isinstance(t, int) or self.fit.changes[t]:
            x_0 = self.fit.apply(x_0, x_t, t, self.scheduler)
            eps = self.scheduler.predict_eps(x_t, t, x_0)
        return clipped(self.scheduler, x_t, t, x_0) if clip_x_0 else (x_0, eps)


def first_calibrated(scheduler: NoiseScheduler) -> int:
    """Return the first timestep that is calibrated."""
    return round(CALIBRATED_FROM * scheduler.timesteps)


@torch.no_grad()
def calibrate(denoiser: Denoiser, images: Tensor, batch_size: int) -> Calibration:
    """Fit a calibration to images (N, C, H, W) in [-1, 1], for a network that has none.

    The images are on the network's device, and at most `batch_size` are computed at a time. The
    calibration's tensors are on the CPU.
    """
    scheduler = denoiser.scheduler
    mean = images.mean(dim=0)
    last = scheduler.timesteps - 1
    first = first_calibrated(scheduler)
    count = min(TIMESTEP_COUNT, last - first + 1)
    # `logsnr_timesteps` returns descending timesteps, but np.interp needs ascending ones.
    times = logsnr_timesteps(scheduler, count, last, first)[::-1]

    weights = []
    for t in tqdm(times, "calibrating", unit="timestep"):
        parts = [
            products(denoiser, images, mean, t, part)
            for part in batches_of(range(len(images)), batch_size)
        ]
        weights.append(least_squares(torch.cat(parts, dim=1).mean(dim=1)))

    return Calibration(mean.cpu(), interpolate_weights(scheduler, times, torch.stack(weights)))


def products(denoiser: Denoiser, images: Tensor, mean: Tensor, t: int, part: range) -> Tensor:
    """Return the products of spectra that the fit of y = w_1 p + w_2 q needs, at timestep t.

    p, q and y are the spectra of the network's x_0, of x_t and of the true x_0, each minus its
    mean. Returns pp, pq, qq, py and qy for a part of the images, averaged over each band:
    (5, len(part), bands).
    """
    scheduler = denoiser.scheduler
    x_0 = images[part.start : part.stop]
    noise = ImageNoise(0, part, mean.shape, images.device, f"calibration {t}")
    x_t = scheduler.q_sample(x_0, t, noise.draw())
    predicted, _ = denoiser.predict(x_t, t)
    p = spectrum(predicted - mean)
    q = spectrum(x_t - scheduler.alpha_bar(t) ** 0.5 * mean)
    y = spectrum(x_0 - mean)
    pairs = ((p, p), (p, q), (q, q), (p, y), (q, y))
    return torch.stack([band_means((a * b.conj()).real) for a, b in pairs])


def least_squares(averages: Tensor) -> Tensor:
    """Fit y = w_1 p + w_2 q in each band, given the averages (5, bands) of `products`.

    Returns w_1 and w_2 of each band: (bands, 2).
    """
    pp, pq, qq, py, qy = averages
    pp = (1 + RIDGE) * pp
    qq = (1 + RIDGE) * qq
    # The two normal equations of a band are solved by Cramer's rule.
    numerators = torch.stack([qq * py - pq * qy, pp * qy - pq * py], dim=-1)
    return numerators / (pp * qq - pq**2)[:, None]


def interpolate_weights(scheduler: NoiseScheduler, times: list[int], fitted: Tensor) -> Tensor:
    """Interpolate weights that were fitted at ascending times: (T, bands, 2) for all timesteps.

    The interpolation is linear in log-SNR. Below times[0] the weights are 1 and 0, which leave the
    network's x_0 unchanged.
    """
    first = times[0]
    noisiness = -torch.logit(scheduler.alphas_cumprod).numpy()
    weights = torch.tensor([1.0, 0.0]).repeat(scheduler.timesteps, fitted.shape[1], 1)

    def interpolate(column):
        return np.interp(noisiness[first:], noisiness[times], column)

    weights[first:] = torch.from_numpy(np.apply_along_axis(interpolate, 0, fitted.numpy()))
    return weights


def with_calibration(image_sampler: ImageSampler, saved: SavedModel) -> ImageSampler:
    """Return the sampler with the calibration that its options ask for, if they ask for one.

    "own" fits it to samples of the model, so that no data are needed; "data" to images that the
    model was trained on; and any other name to images of the data set with that name. Several
    processes each fit it, so that none waits for another. Raises UserError when the training images
    have changed, and for the reasons of `load_and_split`.
    """
    name = image_sampler.options.calibrate
    if not name:
        return image_sampler
    # The images are loaded only when they are needed, and only once.
    load = cache(partial(load_and_split, saved, None if name == "data" else name))
    identity = identity_of(name, saved, load)
    digest = sha256(json.dumps(identity))[:8]
    # The fit is kept beside its model. Nothing is written into a diffusers folder, as it may come
    # from other software.
    folder = Path("samples") if saved.path.is_dir() else saved.path.parent
    path = folder / f"{saved.name}-calibration-{digest}.safetensors"
    constants = [IMAGE_COUNT, CALIBRATED_FROM, TIMESTEP_COUNT, RIDGE]
    origin = {"weights": saved.digest, "images": identity, "fitted": constants}

    fit = read_fit(path, origin)
    if not fit:
        # Samplers of every precision use this file, so the network computes in float32 here.
        float32 = replace(image_sampler.denoiser, precision=torch.float32)
        image_sampler_32 = replace(image_sampler, denoiser=float32)
        images = images_of_fit(image_sampler_32, saved, identity, load)
        fit = calibrate(float32, images.to(image_sampler.device), image_sampler.batch_size)
        # The file only saves time later, so sampling continues if it cannot be written.
        try:
            folder.mkdir(exist_ok=True)
            write_tensors(path, {PART: fit.tensors()}, origin)
            print(f"wrote {path}")
        except OSError as error:
            print(f"WARNING: the calibration cannot be saved: {error}", file=sys.stderr)
    on_device = {name: t.to(image_sampler.device) for name, t in fit.tensors().items()}
    denoiser = Calibrated(image_sampler.denoiser, Calibration(**on_device))
    # Names of results have the digest, unless the model determines the images.
    options = replace(image_sampler.options, calibration_digest=None if name == "own" else digest)
    return replace(image_sampler, denoiser=denoiser, options=options)


def identity_of(name: str, saved: SavedModel, load: Load) -> list[str]:
    """Return what identifies the images of a fit: hashes of their ids and of their pixels."""
    if name == "own":
        return ["own"]
    # The checkpoint has the hashes of its training images, so they need not be here.
    hashes = [saved.provenance.get(fact) for fact in ("train_ids_hash", "pixels_hash")]
    if name == "data" and all(hashes):
        return hashes
    _, split = load()
    return [split.train_ids_hash, split.pixels_hash]


def images_of_fit(
    image_sampler: ImageSampler, saved: SavedModel, identity: list[str], load: Load
) -> Tensor:
    """Return the images that the calibration is fitted to: (N, C, H, W) in [-1, 1]."""
    if identity == ["own"]:
        # This sampler adds fresh noise, so its images are realistic without a calibration.
        quick = image_sampler.quick(seed_of(0, "calibration"))
        return generate(quick, range(IMAGE_COUNT), progress=True).images
    image_set, split = load()
    if [split.train_ids_hash, split.pixels_hash] != identity:
        raise UserError(
            f"{saved.path} was trained on other images than {image_set.name} has; "
            f"to fit the calibration to these, use --calibrate {image_set.name}"
        )
    # The images are evenly spaced in the training split.
    positions = np.linspace(0, len(split.train_indices) - 1, IMAGE_COUNT).astype(int)
    return to_model_range(torch.from_numpy(image_set.images[split.train_indices[positions]]))


def read_fit(path: Path, origin: dict) -> Calibration | None:
    """Return the calibration in a file, or None if the file is missing, damaged or of another."""
    with suppress(UserError, OSError):
        file = TensorFile(path)
        if file.contents == origin:
            return Calibration(**file.tensors(PART))
    return None
