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
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.datasets import load_and_split
from data.pixels import to_model_range
from functions.noise_scheduler import NoiseScheduler, Timestep, broadcast
from functions.prediction import Denoiser, predict
from functions.sampling.generation import ImageSampler, batches_of, generate
from functions.support.checkpoint import SavedModel, TensorFile, write_tensors
from functions.support.errors import UserError
from functions.support.files import file_name, sha256
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
    """A correction that replaces x_0 by x_0'; `interpret` of functions/prediction.py calls it.

    The tensors are float32. They are copied to the device of x_0 if they are on another one.
    """

    # mu (C, H, W)
    mean: Tensor
    # w_1 and w_2 (T, bands, 2). They are 1 and 0 at timesteps that are not calibrated.
    weights: Tensor

    def __call__(self, x_0: Tensor, x_t: Tensor, t: Timestep, scheduler: NoiseScheduler) -> Tensor:
        # The weights are 1 and 0 here, so the transforms would only add rounding errors.
        if isinstance(t, int) and t < first_calibrated(scheduler):
            return x_0
        device = x_0.device
        # The bound computes x_0 on the CPU if the network is on MPS, which lacks float64.
        mean = self.mean.to(device)
        bands = octaves(x_0.shape[-1], device)
        # The weights of the bands are (bands, 2), or (B, bands, 2) if each image has its own t.
        # Each coefficient gets the weights of its band. So w_1 and w_2 are (1, H, W) or
        # (B, 1, H, W), and all channels share them.
        weights = self.weights.to(device)[t][..., bands, :]
        w_1, w_2 = weights.unsqueeze(-4).unbind(-1)
        root = broadcast(scheduler.alpha_bar(t) ** 0.5, x_t)
        mixed = w_1 * spectrum(x_0 - mean) + w_2 * spectrum(x_t - root * mean)
        return mean + torch.fft.ifft2(mixed, norm="ortho").real


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
    with denoiser.evaluating():
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
    predicted, _ = predict(denoiser, scheduler, x_t, t)
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

    The calibration is fitted once for each data set, and saved next to the checkpoint. Several
    processes each fit it, so that none waits for another. "own" fits it to samples of the model, so
    that no data are needed. "data" fits it to images that the model was trained on, and any other
    name to images of the data set with that name. Raises UserError when the training images have
    changed, and for the reasons of `load_and_split`.
    """
    if not image_sampler.options.calibrate:
        return image_sampler
    tensors, digest = load_or_fit(image_sampler, saved)
    tensors = {name: tensor.to(image_sampler.device) for name, tensor in tensors.items()}
    denoiser = replace(image_sampler.denoiser, calibration=Calibration(**tensors))
    options = replace(image_sampler.options, calibration_digest=digest)
    return replace(image_sampler, denoiser=denoiser, options=options)


def load_or_fit(
    image_sampler: ImageSampler, saved: SavedModel
) -> tuple[dict[str, Tensor], str | None]:
    """Read the tensors of a `Calibration` from its file, or fit them; they are on the CPU.

    Also returns a digest of the images' identity, or None if the checkpoint determines the images.
    """
    name = image_sampler.options.calibrate
    # The images are loaded only when they are needed, and only once.
    load = cache(partial(load_and_split, saved, None if name == "data" else name))
    # Files may be added to a data set, or deleted from it. So the images of the fit are identified
    # by the data set's name and by a hash of the ids of its training images.
    ids_hash = saved.provenance.get("train_ids_hash")
    digest = None
    if name == "own":
        identity = ["own"]
    elif name == "data" and ids_hash:
        # The checkpoint has this hash, so the file is found without loading the images.
        identity = [saved.config["diffusion"]["dataset_name"], ids_hash]
    else:
        image_set, split = load()
        identity = [image_set.name, split.train_ids_hash]
        digest = sha256(json.dumps(identity))[:8]
    kind = "-".join(file_name(Path(part).stem) for part in identity)

    # A diffusers folder may come from other software, so nothing is written into it.
    folder = Path("samples") if saved.path.is_dir() else saved.path.parent
    path = folder / f"{saved.name}-calibration-{kind}.safetensors"
    origin = {
        "weights": saved.digest,
        "images": identity,
        "fitted": [IMAGE_COUNT, CALIBRATED_FROM, TIMESTEP_COUNT, RIDGE],
    }

    tensors = read_calibration(path, origin, image_sampler)
    if tensors:
        return tensors, digest

    # Samplers of every precision use this file, so the network computes in float32 here.
    denoiser = replace(image_sampler.denoiser, precision=torch.float32)
    if name == "own":
        # This sampler adds fresh noise, so its images are realistic without a calibration.
        quick = replace(image_sampler, denoiser=denoiser).quick(seed_of(0, "calibration"))
        images = generate(quick, range(IMAGE_COUNT), progress=True).images
    else:
        image_set, split = load()
        if split.train_ids_hash != identity[1]:
            raise UserError(
                f"{saved.path} was trained on other images than {image_set.name} has; "
                f"to fit the calibration to these, use --calibrate {image_set.name}"
            )
        # The fit uses evenly spaced images of the training split.
        positions = np.linspace(0, len(split.train_indices) - 1, IMAGE_COUNT).astype(int)
        pixels = image_set.images[split.train_indices[positions]]
        images = to_model_range(torch.from_numpy(pixels))
    images = images.to(image_sampler.device)
    tensors = vars(calibrate(denoiser, images, image_sampler.batch_size))
    # The file only saves time later, so sampling continues if it cannot be written.
    try:
        folder.mkdir(exist_ok=True)
        write_tensors(path, {PART: tensors}, origin)
        print(f"wrote {path}")
    except OSError as error:
        print(f"WARNING: the calibration cannot be saved: {error}", file=sys.stderr)
    return tensors, digest


def read_calibration(path: Path, origin: dict, image_sampler: ImageSampler) -> dict[str, Tensor]:
    """Return the tensors of a calibration's file, or {} if it is missing or has another origin."""
    bands = int(octaves(image_sampler.shape[-1]).max()) + 1
    shapes = {
        "mean": image_sampler.shape,
        "weights": (image_sampler.scheduler.timesteps, bands, 2),
    }
    # A missing or damaged file is not an error, because the caller then writes it again.
    with suppress(UserError, OSError):
        file = TensorFile(path)
        if file.contents == origin:
            tensors = file.tensors(PART)
            if {name: tensor.shape for name, tensor in tensors.items()} == shapes:
                return tensors
    return {}
