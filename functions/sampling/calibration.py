"""A cure without training for what a network does not know of x_0 at high t: colour, darkness
and speckles.

At each timestep and in each band of spatial frequency the network's x_0 is replaced by the best
linear mix of it and x_t, about the average image mu:

    x_0' = mu + w_1 (x_0 - mu) + w_2 (x_t - sqrt(alpha_bar) mu)

The weights are two real numbers for each band and t. They are fitted by least squares at some
timesteps and interpolated between them. On the images that they are fitted to they are as good as
the network alone, (1, 0), and as the best linear filter of x_t, (0, w), or better.
docs/whole-before-detail.md says why it helps. Related, with one number a timestep: Pang et al.
2023, arXiv:2302.10688.
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

from data.datasets import images_of_run
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
IMAGES = 512
# x_0 is replaced from this share of T on: below it the network knows more than a mix can add.
CALIBRATED_FROM = 0.6
# The weights are fitted at this many timesteps from there to T - 1, evenly spaced in log-SNR.
FITTED = 17
# The squares are raised by this share: where x_0 is a multiple of x_t, one weight is as good as
# the other, and least squares alone could not choose.
RIDGE = 1e-4

# With this norm white noise has variance 1 in the spectrum too.
spectrum = partial(torch.fft.fft2, norm="ortho")


def octaves(size: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the band of each coefficient in the spectrum of a square image: (size, size) int64.

    Band 0 is the mean. Band k has frequencies from 2^(k-1) to 2^k cycles an image, and the last
    band all that are higher, too.
    """
    cycles = torch.fft.fftfreq(size, 1 / size, device=device)
    frequencies = torch.hypot(cycles[:, None], cycles)
    # The mean, of frequency 0, counts as half a cycle, so that it is one octave below the rest.
    octave = 1 + torch.log2(frequencies.clamp(min=0.5)).floor().long()
    return octave.clamp(max=max(1, size.bit_length() - 2))


def band_means(values: Tensor) -> Tensor:
    """Average real numbers, (B, C, H, W) for each coefficient of spectra, over bands and channels.

    Returns (B, bands) float64, on the CPU.
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
    # w_1 and w_2 (T, bands, 2). They are 1 and 0 where nothing changes.
    weights: Tensor

    def __call__(self, x_0: Tensor, x_t: Tensor, t: Timestep, scheduler: NoiseScheduler) -> Tensor:
        # Where the weights are 1 and 0 the transforms would change x_0 by nothing but rounding.
        if isinstance(t, int) and t < CALIBRATED_FROM * scheduler.timesteps:
            return x_0
        bands = octaves(x_0.shape[-1], x_0.device)
        # The weights of bands, (bands, 2) or (B, bands, 2), become those of coefficients: each is
        # (1, H, W), or (B, 1, H, W), and holds for all channels.
        weights = self.weights[t][..., bands, :]
        w_1, w_2 = weights.unsqueeze(-4).unbind(-1)
        root = broadcast(scheduler.alpha_bar(t) ** 0.5, x_t)
        mixed = w_1 * spectrum(x_0 - self.mean) + w_2 * spectrum(x_t - root * self.mean)
        return self.mean + torch.fft.ifft2(mixed, norm="ortho").real


@torch.no_grad()
def calibrate(denoiser: Denoiser, images: Tensor, batch_size: int) -> Calibration:
    """Fit a network without calibration to images (N, C, H, W) in [-1, 1] on its device.

    The network computes at most `batch_size` images at a time. Returns tensors on the CPU.
    """
    scheduler = denoiser.scheduler
    mean = images.mean(dim=0)
    last = scheduler.timesteps - 1
    first = round(CALIBRATED_FROM * scheduler.timesteps)
    count = min(FITTED, last - first + 1)
    # The timesteps come falling, and interpolation wants them rising.
    times = logsnr_timesteps(scheduler, count, last, first)[::-1]

    limit = BatchLimit(images.device, batch_size)
    fitted = []
    with denoiser.evaluating():
        for t in tqdm(times, "calibrating", unit="timestep"):
            work = partial(products, denoiser, images, mean, t)
            parts = limit.in_parts(work, range(len(images)))
            fitted.append(least_squares(torch.cat(parts, dim=1).mean(dim=1)))

    return Calibration(mean.cpu(), interpolated(scheduler, times, torch.stack(fitted)))


def products(denoiser: Denoiser, images: Tensor, mean: Tensor, t: int, part: range) -> Tensor:
    """Return the products of spectra that the fit of y = w_1 p + w_2 q needs, at timestep t.

    p is the network's x_0, q is x_t and y the true x_0, each less its average. The products are
    pp, pq, qq, py and qy, averaged over each band, for a part of the images: (5, images, bands).
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


def interpolated(scheduler: NoiseScheduler, times: list[int], fitted: Tensor) -> Tensor:
    """Return the weights of all timesteps (T, bands, 2), given those fitted at rising times.

    They are interpolated linearly in log-SNR. Below the first time they are 1 and 0, which leave
    the network's x_0 as it is.
    """
    first = times[0]
    noisiness = -torch.logit(scheduler.alphas_cumprod).numpy()
    weights = torch.tensor([1.0, 0.0]).repeat(scheduler.timesteps, fitted.shape[1], 1)

    def between(column):
        return np.interp(noisiness[first:], noisiness[times], column)

    weights[first:] = torch.from_numpy(np.apply_along_axis(between, 0, fitted.numpy()))
    return weights


def calibrated(
    image_sampler: ImageSampler, saved: SavedModel, processes: Processes
) -> ImageSampler:
    """Return the sampler with the calibration that its options ask for, if they ask for one.

    It is made once for each data set, and lies beside the checkpoint from then on. "own" fits it to
    the model's own samples, so that no data is needed; "data" to the images that the model was
    trained on, and any other name to the images of that data set. Raises UserError as
    `images_of_run`, and when the training's images have changed.
    """
    if not image_sampler.options.calibrate:
        return image_sampler
    tensors = processes.on_main(lambda: read_or_make(image_sampler, saved))
    tensors = {name: tensor.to(image_sampler.device) for name, tensor in tensors.items()}
    denoiser = replace(image_sampler.denoiser, calibration=Calibration(**tensors))
    return replace(image_sampler, denoiser=denoiser)


def read_or_make(image_sampler: ImageSampler, saved: SavedModel) -> dict[str, Tensor]:
    """Return the tensors of `Calibration`, on the CPU: of the file that is kept, or fitted now."""
    name = image_sampler.options.calibrate
    # The images are loaded when they are needed, and once.
    load = cache(partial(images_of_run, saved, None if name == "data" else name))
    # Images are known by their data set's name and by their ids, as files may come and go.
    ids_hash = saved.run.get("train_ids_hash")
    if name == "own":
        calibrated_on = ["own"]
    elif name == "data" and ids_hash:
        # What is kept for a run's own images is read without them.
        calibrated_on = [saved.config["diffusion"]["dataset_name"], ids_hash]
    else:
        image_set, split = load()
        calibrated_on = [image_set.name, split.train_ids_hash]
    kind = "-".join(short(Path(part).stem) for part in calibrated_on)

    # A folder of diffusers belongs to others, so nothing is written into it.
    folder = Path("samples") if saved.path.is_dir() else saved.path.parent
    path = folder / f"{saved.name}-calibration-{kind}.safetensors"
    made_from = {
        "weights": saved.digest,
        "images": calibrated_on,
        "fitted": [IMAGES, CALIBRATED_FROM, FITTED, RIDGE],
    }

    tensors = read_kept(path, made_from, image_sampler)
    if tensors:
        return tensors

    # It is kept for samplers of every precision, so it is fitted in float32.
    denoiser = replace(image_sampler.denoiser, precision=torch.float32)
    if name == "own":
        # The fresh noise of this sampler keeps its images sound without a calibration.
        quick = replace(image_sampler, denoiser=denoiser).quick(seed_of("calibration"))
        images = generate(quick, range(IMAGES)).images
    else:
        image_set, split = load()
        if split.train_ids_hash != calibrated_on[1]:
            raise UserError(
                f"{saved.path} was trained on other images than {image_set.name} has; "
                f"fit the calibration to these with --calibrate {image_set.name}"
            )
        # The images are evenly spaced among those for training.
        positions = np.linspace(0, len(split.train_indices) - 1, IMAGES).astype(int)
        pixels = image_set.images[split.train_indices[positions]]
        images = to_model_range(torch.from_numpy(pixels))
    images = images.to(image_sampler.device)
    tensors = vars(calibrate(denoiser, images, image_sampler.batch_size))
    # The file is for the next time. Where it cannot be written, sampling goes on without it.
    try:
        folder.mkdir(exist_ok=True)
        write_tensors(path, tensors, made_from)
        print(f"wrote {path}")
    except OSError as error:
        print(f"WARNING: the calibration is not kept: {error}", file=sys.stderr)
    return tensors


def read_kept(path: Path, made_from: dict, image_sampler: ImageSampler) -> dict[str, Tensor]:
    """Return the tensors of the file; none when they were made from anything else."""
    bands = int(octaves(image_sampler.shape[-1]).max()) + 1
    shapes = {
        "mean": image_sampler.shape,
        "weights": (image_sampler.scheduler.timesteps, bands, 2),
    }
    # A file that is missing or damaged is not an error: it is written again.
    with suppress(UserError, OSError):
        file = TensorFile(path)
        if file.contents == made_from:
            tensors = file.tensors()
            if {name: tensor.shape for name, tensor in tensors.items()} == shapes:
                return tensors
    return {}
