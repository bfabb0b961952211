"""Correct the x_0 that a trained network predicts at high t, without training it further.

Errors there give samples wrong colours, darkness and speckles. In each band of spatial frequencies,
the network's x_0 is replaced by the best linear mix of x_0 and x_t, relative to the mean image mu:

    x_0' = mu + w_1 (x_0 - mu) + w_2 (x_t - sqrt(alpha_bar) mu)

Each band has two real weights at each timestep. They are fitted by least squares at some timesteps
and interpolated in between. On the images of the fit, the mix is at least as good as the network
alone, which is (w_1, w_2) = (1, 0), and as the best linear filter of x_t, which is (0, w).
docs/whole-before-detail.md says why this helps. Pang et al. 2023, arXiv:2302.10688, use one number
for each timestep.
"""

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
from functions.sampling.generation import BatchLimit, ImageSampler, generate
from functions.support.checkpoint import SavedModel
from functions.support.errors import UserError
from functions.support.files import TensorFile, short, write_tensors
from functions.support.processes import Processes
from functions.support.random_numbers import ImageNoise, seed_of
from functions.timesteps import logsnr_timesteps

# The weights are fitted to this many images.
IMAGE_COUNT = 512
# Timesteps from this fraction of T on are calibrated. At lower t no mix improves on the network.
CALIBRATED_FROM = 0.6
# The weights are fitted at this many of these timesteps, evenly spaced in log-SNR.
TIMESTEP_COUNT = 17
# The fit multiplies squares by 1 + RIDGE. Without this it would have no unique solution where x_0
# is a multiple of x_t.
RIDGE = 1e-4

# With this norm the spectrum of white noise has variance 1, too.
spectrum = partial(torch.fft.fft2, norm="ortho")


def octaves(size: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the band of each coefficient in the spectrum of a square image: (size, size) int64.

    Band 0 is the mean. Band k has frequencies from 2^(k-1) to 2^k cycles an image. The last band
    has all higher frequencies, too.
    """
    cycles = torch.fft.fftfreq(size, 1 / size, device=device)
    frequencies = torch.hypot(cycles[:, None], cycles)
    # The mean has frequency 0. It counts as half a cycle, which is one octave below band 1.
    octave = 1 + torch.log2(frequencies.clamp(min=0.5)).floor().long()
    return octave.clamp(max=max(1, size.bit_length() - 2))


def band_means(values: Tensor) -> Tensor:
    """Average real values of the coefficients of spectra, (B, C, H, W), over bands and channels.

    Returns (B, bands) in float64, on the CPU.
    """
    bands = octaves(values.shape[-1]).flatten()
    values = values.mean(dim=1).flatten(1).cpu().double()
    sums = values.new_zeros(len(values), bands.max() + 1).index_add_(1, bands, values)
    return sums / torch.bincount(bands)


@dataclass(frozen=True)
class Calibration:
    """Replace x_0 by x_0'; `interpret` of functions/prediction.py calls this.

    The tensors are float32, on the device of x_0.
    """

    # mu (C, H, W)
    mean: Tensor
    # w_1 and w_2 (T, bands, 2). They are 1 and 0 at timesteps that are not calibrated.
    weights: Tensor

    def __call__(self, x_0: Tensor, x_t: Tensor, t: Timestep, scheduler: NoiseScheduler) -> Tensor:
        # The weights are 1 and 0 here, so the transforms would only add rounding errors.
        if isinstance(t, int) and t < CALIBRATED_FROM * scheduler.timesteps:
            return x_0
        bands = octaves(x_0.shape[-1], x_0.device)
        # Each coefficient gets the weights of its band, (bands, 2) or (B, bands, 2). So w_1 and w_2
        # are (1, H, W) or (B, 1, H, W), and the same for all channels.
        weights = self.weights[t][..., bands, :]
        w_1, w_2 = weights.unsqueeze(-4).unbind(-1)
        root = broadcast(scheduler.alpha_bar(t) ** 0.5, x_t)
        mixed = w_1 * spectrum(x_0 - self.mean) + w_2 * spectrum(x_t - root * self.mean)
        return self.mean + torch.fft.ifft2(mixed, norm="ortho").real


@torch.no_grad()
def calibrate(denoiser: Denoiser, images: Tensor, batch_size: int) -> Calibration:
    """Fit a calibration for a network that has none to images (N, C, H, W) in [-1, 1].

    The images are on the network's device, which computes at most `batch_size` at a time. The
    calibration's tensors are on the CPU.
    """
    scheduler = denoiser.scheduler
    mean = images.mean(dim=0)
    last = scheduler.timesteps - 1
    first = round(CALIBRATED_FROM * scheduler.timesteps)
    count = min(TIMESTEP_COUNT, last - first + 1)
    # `logsnr_timesteps` returns falling timesteps, but np.interp needs rising ones.
    times = logsnr_timesteps(scheduler, count, last, first)[::-1]

    limit = BatchLimit(images.device, batch_size)
    weights = []
    with denoiser.evaluating():
        for t in tqdm(times, "calibrating", unit="timestep"):
            work = partial(products, denoiser, images, mean, t)
            parts = limit.in_parts(work, range(len(images)))
            weights.append(least_squares(torch.cat(parts, dim=1).mean(dim=1)))

    return Calibration(mean.cpu(), interpolate_weights(scheduler, times, torch.stack(weights)))


def products(denoiser: Denoiser, images: Tensor, mean: Tensor, t: int, part: range) -> Tensor:
    """Return the products of spectra that the fit of y = w_1 p + w_2 q needs, at timestep t.

    p is the spectrum of the network's x_0, q that of x_t and y that of the true x_0, each minus its
    mean. Returns pp, pq, qq, py and qy of a part of the images, averaged over each band:
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
    """Return the weights of all timesteps (T, bands, 2), given the fitted weights at rising times.

    The interpolation is linear in log-SNR. Below the first of the times the weights are 1 and 0,
    which do not change the network's x_0.
    """
    first = times[0]
    noisiness = -torch.logit(scheduler.alphas_cumprod).numpy()
    weights = torch.tensor([1.0, 0.0]).repeat(scheduler.timesteps, fitted.shape[1], 1)

    def interpolate(column):
        return np.interp(noisiness[first:], noisiness[times], column)

    weights[first:] = torch.from_numpy(np.apply_along_axis(interpolate, 0, fitted.numpy()))
    return weights


def with_calibration(
    image_sampler: ImageSampler, saved: SavedModel, processes: Processes
) -> ImageSampler:
    """Return the sampler with the calibration that its options ask for, if they ask for one.

    The calibration is fitted once for each data set, and saved beside the checkpoint. The option
    "own" fits it to samples of the model, which needs no data. "data" fits it to images that the
    model was trained on, and any other name to images of the data set with that name. Raises
    UserError as `load_and_split` does, and when the training images have changed.
    """
    if not image_sampler.options.calibrate:
        return image_sampler
    tensors = processes.on_main(lambda: load_or_fit(image_sampler, saved))
    tensors = {name: tensor.to(image_sampler.device) for name, tensor in tensors.items()}
    denoiser = replace(image_sampler.denoiser, calibration=Calibration(**tensors))
    return replace(image_sampler, denoiser=denoiser)


def load_or_fit(image_sampler: ImageSampler, saved: SavedModel) -> dict[str, Tensor]:
    """Return the tensors of `Calibration` on the CPU: read them from their file, or fit them."""
    name = image_sampler.options.calibrate
    # The images are loaded when they are needed, and only once.
    load = cache(partial(load_and_split, saved, None if name == "data" else name))
    # Files may be added to a data set, or deleted. So the name of the data set and a hash of the
    # ids of its training images identify the images of the fit.
    ids_hash = saved.provenance.get("train_ids_hash")
    if name == "own":
        identity = ["own"]
    elif name == "data" and ids_hash:
        # The file for the training images is found without loading them.
        identity = [saved.config["diffusion"]["dataset_name"], ids_hash]
    else:
        image_set, split = load()
        identity = [image_set.name, split.train_ids_hash]
    kind = "-".join(short(Path(part).stem) for part in identity)

    # A folder of diffusers is not ours, so nothing is written into it.
    folder = Path("samples") if saved.path.is_dir() else saved.path.parent
    path = folder / f"{saved.name}-calibration-{kind}.safetensors"
    origin = {
        "weights": saved.digest,
        "images": identity,
        "fitted": [IMAGE_COUNT, CALIBRATED_FROM, TIMESTEP_COUNT, RIDGE],
    }

    tensors = read_calibration(path, origin, image_sampler)
    if tensors:
        return tensors

    # The file serves samplers of every precision, so the network computes in float32 here.
    denoiser = replace(image_sampler.denoiser, precision=torch.float32)
    if name == "own":
        # This sampler adds fresh noise, so its images are realistic without a calibration.
        quick = replace(image_sampler, denoiser=denoiser).quick(seed_of("calibration"))
        images = generate(quick, range(IMAGE_COUNT)).images
    else:
        image_set, split = load()
        if split.train_ids_hash != identity[1]:
            raise UserError(
                f"{saved.path} was trained on other images than {image_set.name} has; "
                f"fit the calibration to these with --calibrate {image_set.name}"
            )
        # The fit takes evenly spaced images of the training split.
        positions = np.linspace(0, len(split.train_indices) - 1, IMAGE_COUNT).astype(int)
        pixels = image_set.images[split.train_indices[positions]]
        images = to_model_range(torch.from_numpy(pixels))
    images = images.to(image_sampler.device)
    tensors = vars(calibrate(denoiser, images, image_sampler.batch_size))
    # The file only saves time later, so sampling goes on if it cannot be written.
    try:
        folder.mkdir(exist_ok=True)
        write_tensors(path, tensors, origin)
        print(f"wrote {path}")
    except OSError as error:
        print(f"WARNING: the calibration is not saved: {error}", file=sys.stderr)
    return tensors


def read_calibration(path: Path, origin: dict, image_sampler: ImageSampler) -> dict[str, Tensor]:
    """Return the tensors of a calibration's file, or {} if the file has another origin."""
    bands = int(octaves(image_sampler.shape[-1]).max()) + 1
    shapes = {
        "mean": image_sampler.shape,
        "weights": (image_sampler.scheduler.timesteps, bands, 2),
    }
    # A missing or damaged file is no error, because the caller writes it again.
    with suppress(UserError, OSError):
        file = TensorFile(path)
        if file.contents == origin:
            tensors = file.tensors()
            if {name: tensor.shape for name, tensor in tensors.items()} == shapes:
                return tensors
    return {}
