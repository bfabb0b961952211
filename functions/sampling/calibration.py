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

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.pixels import to_model_range
from functions.denoiser import Denoiser, clipped
from functions.noise_scheduler import NoiseScheduler, Timestep
from functions.sampling.generation import ImageSampler, batches_of, generate
from functions.saved.checkpoint import SavedModel, TensorFile, Tensors, write_tensors
from functions.saved.loading import load_and_split
from functions.spectra import band_sums, octaves, spectrum
from functions.support.errors import CheckpointError, UserError
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


@dataclass(frozen=True)
class Calibrated:
    """A denoiser whose x_0 is corrected by a calibration that was fitted to it.

    The tensors are float32, on the device of x_0.
    """

    denoiser: Denoiser
    # mu (C, H, W)
    mean: Tensor
    # w_1 and w_2 (T, bands, 2). They are 1 and 0 at timesteps that are not calibrated.
    weights: Tensor

    @property
    def scheduler(self) -> NoiseScheduler:
        return self.denoiser.scheduler

    def predict(self, x_t: Tensor, t: Timestep, clip_x_0: bool = False) -> tuple[Tensor, Tensor]:
        """Return the corrected x_0 and its eps at (x_t, t), as `Denoiser.predict` does."""
        x_0, eps = self.denoiser.predict(x_t, t)
        # The weights of the bands are (bands, 2), or (B, bands, 2) if each image has its own t.
        # Each coefficient gets the weights of its band. So w_1 and w_2 are (1, H, W) or
        # (B, 1, H, W), and all channels share them.
        bands = octaves(x_0.shape[-1], x_0.device)
        w_1, w_2 = self.weights[t][..., bands, :].unsqueeze(-4).unbind(-1)
        sqrt_a, sqrt_1_minus_a = self.scheduler.square_roots(t, x_t)
        # Where the weights are 1 and 0, this change of x_0 is exactly 0.
        change = (w_1 - 1) * spectrum(x_0 - self.mean)
        change = change + w_2 * spectrum(x_t - sqrt_a * self.mean)
        change = torch.fft.ifft2(change, norm="ortho").real
        x_0 = x_0 + change
        # x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps stays true.
        eps = eps - sqrt_a / sqrt_1_minus_a * change
        return clipped(self.scheduler, x_t, t, x_0) if clip_x_0 else (x_0, eps)


@torch.no_grad()
def calibrate(denoiser: Denoiser, images: Tensor, batch_size: int) -> Tensors:
    """Fit the mean and the weights of `Calibrated` to images (N, C, H, W) in [-1, 1].

    The images are on the network's device, and at most `batch_size` are computed at a time. The
    tensors are returned by name, on the CPU.
    """
    scheduler = denoiser.scheduler
    mean = images.mean(dim=0)
    last = scheduler.timesteps - 1
    first = round(CALIBRATED_FROM * scheduler.timesteps)
    count = min(TIMESTEP_COUNT, last - first + 1)
    # `logsnr_timesteps` returns descending timesteps, but np.interp needs ascending ones.
    times = logsnr_timesteps(scheduler, count, last, first)[::-1]

    weights = []
    for t in tqdm(times, "calibrating", unit="timestep"):
        products = 0
        for part in batches_of(range(len(images)), batch_size):
            noise = ImageNoise(0, part, mean.shape, images.device, f"calibration {t}").draw()
            x_0 = images[part.start : part.stop]
            products += band_products(denoiser, x_0, mean, t, noise)
        weights.append(least_squares(products))

    fitted = torch.stack(weights)
    return {"mean": mean.cpu(), "weights": interpolate_weights(scheduler, times, fitted)}


def band_products(denoiser: Denoiser, x_0: Tensor, mean: Tensor, t: int, noise: Tensor) -> Tensor:
    """Return the products of spectra that the fit y = w_1 p + w_2 q needs, summed over each band.

    p, q and y are the spectra of the network's x_0, of x_t and of the true x_0, each minus its
    mean. Returns the products of each with each, in this order: (bands, 3, 3).
    """
    scheduler = denoiser.scheduler
    x_t = scheduler.q_sample(x_0, t, noise)
    predicted, _ = denoiser.predict(x_t, t)
    x_t_mean = scheduler.alpha_bar(t) ** 0.5 * mean
    spectra = spectrum(torch.stack([predicted - mean, x_t - x_t_mean, x_0 - mean]))
    products = torch.einsum("ibchw,jbchw->ijhw", spectra, spectra.conj()).real
    return band_sums(products).permute(2, 0, 1)


def least_squares(products: Tensor) -> Tensor:
    """Fit y = w_1 p + w_2 q in each band, given the `band_products`.

    Returns w_1 and w_2 of each band: (bands, 2).
    """
    # These are the normal equations.
    A = products[:, :2, :2] * (1 + RIDGE * torch.eye(2).double())
    return torch.linalg.solve(A, products[:, :2, 2])


def interpolate_weights(scheduler: NoiseScheduler, times: list[int], fitted: Tensor) -> Tensor:
    """Interpolate weights that were fitted at ascending times: (T, bands, 2) for all timesteps.

    The interpolation is linear in log-SNR. Below times[0] the weights are 1 and 0, which leave the
    network's x_0 unchanged.
    """
    first = times[0]
    noisiness = -torch.logit(scheduler.alphas_cumprod).numpy()

    def interpolated(column):
        return np.interp(noisiness[first:], noisiness[times], column)

    weights = torch.tensor([1.0, 0.0]).repeat(scheduler.timesteps, fitted.shape[1], 1)
    weights[first:] = torch.from_numpy(np.apply_along_axis(interpolated, 0, fitted.numpy()))
    return weights


def with_calibration(image_sampler: ImageSampler, saved: SavedModel) -> ImageSampler:
    """Return the sampler with the calibration that its options ask for, if they ask for one.

    "data" fits it to images that the model was trained on, and "own" to samples of the model, so
    that no data are needed. Several processes each fit it, so that none waits for another. Raises
    UserError when the training images have changed or the file is damaged, and for the reasons of
    `load_and_split`.
    """
    name = image_sampler.options.calibrate
    if not name:
        return image_sampler
    # The fit is kept beside its model. Nothing is written into a diffusers folder, as it may come
    # from other software.
    folder = Path("samples") if saved.path.is_dir() else saved.path.parent
    # Another model may later have the same path.
    path = folder / f"{saved.name}-calibration-{name}-{saved.digest[:8]}.safetensors"
    if path.exists():
        try:
            fit = TensorFile(path).tensors(PART)
        except CheckpointError as error:
            raise UserError(f"{error}; delete this file, and it is fitted again") from error
    else:
        # Samplers of every precision use this file, so the network computes in float32 here.
        float32 = replace(image_sampler.denoiser, precision=torch.float32)
        images = images_of_fit(replace(image_sampler, denoiser=float32), saved)
        fit = calibrate(float32, images.to(image_sampler.device), image_sampler.batch_size)
        # The file only saves time later, so sampling continues if it cannot be written.
        with suppress(OSError):
            folder.mkdir(exist_ok=True)
            write_tensors(path, {PART: fit}, {})
            print(f"wrote {path}")
    mean = fit["mean"].to(image_sampler.device)
    weights = fit["weights"].to(image_sampler.device)
    return replace(image_sampler, denoiser=Calibrated(image_sampler.denoiser, mean, weights))


def images_of_fit(image_sampler: ImageSampler, saved: SavedModel) -> Tensor:
    """Return the images that the calibration is fitted to: (N, C, H, W) in [-1, 1]."""
    if image_sampler.options.calibrate == "own":
        # This sampler adds fresh noise, so its images are realistic without a calibration.
        quick = image_sampler.quick(seed_of(0, "calibration"))
        return generate(quick, range(IMAGE_COUNT), progress=True)
    image_set, split = load_and_split(saved)
    # Models of earlier versions do not say the hash of their pixels.
    if saved.provenance.get("pixels_hash") not in (None, split.pixels_hash):
        raise UserError(
            f"{saved.path} was trained on other images than {image_set.name} has now; "
            "use --calibrate own, which needs no data"
        )
    # The images are evenly spaced in the training split.
    positions = np.linspace(0, len(split.train_indices) - 1, IMAGE_COUNT).astype(int)
    return to_model_range(torch.from_numpy(image_set.images[split.train_indices[positions]]))
