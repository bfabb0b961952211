"""A cure without training for what a network does not know of x_0 at high t: colour, darkness, speckles.

At each timestep and in each band of frequencies (functions/spectrum.py) the network's x_0 is replaced by the best
linear mix of it and x_t, about the average image mu:

    x_0' = mu + w_1 (x_0 - mu) + w_2 (x_t - sqrt(alpha_bar) mu)

Two real numbers a band and t by least squares: on the images that they are fitted to never worse than the network alone
(1, 0), nor than the best linear filter of x_t (0, w). docs/whole-before-detail.md says why it helps. Related, with one
number a timestep: Pang et al. 2023, arXiv:2302.10688.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data.pixels import to_model_range
from functions.noise_scheduler import NoiseScheduler, Timestep, broadcast
from functions.prediction import Denoiser, predict
from functions.sampling.generation import BatchLimit, ImageSampler, generate
from functions.sampling.options import SamplerOptions
from functions.spectrum import band_means, octaves, spectrum
from functions.support.checkpoint import SavedModel
from functions.support.errors import CheckpointError
from functions.support.files import TensorFile, write_tensors
from functions.support.processes import Processes
from functions.support.random_numbers import ImageNoise, seed_of

IMAGES = 512  # that the numbers are fitted to
FROM = 0.6  # as a share of T: at lower t the network knows more than the numbers could add
FITTED = 17  # timesteps from there to T - 1; between them the numbers are interpolated
RIDGE = 1e-4  # relative: where x_0 is a multiple of x_t, one of the numbers is as good as the other


@dataclass(frozen=True)
class Calibration:
    """What `interpret` of functions/prediction.py calls: x_0 -> x_0'."""

    mean: Tensor  # (C, H, W): mu
    weights: Tensor  # (T, bands, 2): w_1 and w_2; 1 and 0 where nothing changes

    def __call__(self, x_0: Tensor, x_t: Tensor, t: Timestep, scheduler: NoiseScheduler) -> Tensor:
        mean, bands = self.mean.to(x_0), octaves(x_0.shape[-1], x_0.device)
        of_bands = self.weights[t.cpu() if isinstance(t, Tensor) else t].to(x_0)
        w_1, w_2 = of_bands[..., bands, :].unsqueeze(-4).unbind(-1)  # (1, H, W), or (B, 1, H, W)
        root = broadcast(scheduler.alpha_bar(t) ** 0.5, x_t)
        mixed = w_1 * spectrum(x_0 - mean) + w_2 * spectrum(x_t - root * mean)
        return mean + torch.fft.ifft2(mixed, norm="ortho").real


@torch.no_grad()
def calibrate(denoiser: Denoiser, images: Tensor, batch_size: int) -> Calibration:
    """Fit a network without calibration to images (N, C, H, W) in [-1, 1] on its device."""
    scheduler, mean = denoiser.scheduler, images.mean(dim=0)
    times = np.linspace(FROM * scheduler.timesteps, scheduler.timesteps - 1, FITTED).round().astype(int).tolist()
    limit, fitted = BatchLimit(images.device, batch_size), []

    def products(some: range, t: int) -> Tensor:
        """Of the spectra of x_0, x_t (p, q) and the true x_0 (y): (5, images, bands), pp, pq, qq, py, qy."""
        x_0, noise = images[some.start : some.stop], ImageNoise(0, some, mean.shape, images.device, f"calibration {t}")
        x_t = scheduler.q_sample(x_0, t, noise.draw())
        seen, root = predict(denoiser, scheduler, x_t, t)[0], scheduler.alpha_bar(t) ** 0.5
        p, q, y = (spectrum(centred) for centred in (seen - mean, x_t - root * mean, x_0 - mean))
        pairs = ((p, p), (p, q), (q, q), (p, y), (q, y))
        return torch.stack([band_means((a * b.conj()).real) for a, b in pairs]).cpu()

    with denoiser.evaluating():
        for t in tqdm(times, "calibrating", unit="timestep"):
            parts = limit.in_parts(lambda some, t=t: products(some, t), range(len(images)))
            pp, pq, qq, py, qy = torch.cat(parts, dim=1).mean(dim=1)  # (bands,) each
            pp, qq = (1 + RIDGE) * pp, (1 + RIDGE) * qq
            numbers = torch.stack([qq * py - pq * qy, pp * qy - pq * py], dim=-1)  # by Cramer's rule
            fitted.append(numbers / (pp * qq - pq**2)[..., None])
    columns = torch.stack(fitted).float().permute(1, 2, 0)  # (bands, 2, K)
    between = F.interpolate(columns, scheduler.timesteps - times[0], mode="linear", align_corners=True).permute(2, 0, 1)
    unchanged = torch.tensor([1.0, 0.0]).expand(times[0], *between.shape[1:])
    return Calibration(mean.cpu(), torch.cat([unchanged, between]))


def calibrated(
    image_sampler: ImageSampler, saved: SavedModel, batch_size: int, images_of_run: Callable, processes: Processes
) -> ImageSampler:
    """The sampler with the calibration that its options ask for; one that was made before lies beside the checkpoint.

    "own" fits to the model's own samples, which fresh noise keeps sound, so that no data is needed; `images_of_run` is
    that of data/datasets.py, for "data" and other data sets.
    """
    which, denoiser = image_sampler.options.calibrate, image_sampler.denoiser

    def read_or_make() -> Calibration:
        made_from = {"weights": saved.digest, "images": "own", "count": IMAGES}
        if which != "own":
            name = None if which == "data" else which
            image_set, split = images_of_run(saved.config["diffusion"], saved.image_shape[-1], name)
            made_from["images"] = split.train_ids_hash
        path = saved.path.with_name(f"{saved.path.stem}-calibration-{'own' if which == 'own' else 'data'}.safetensors")
        try:
            file = TensorFile(path)
            if file.contents == made_from:
                return Calibration(**file.tensors())
        except (CheckpointError, OSError):
            pass  # none there, or damaged
        if which == "own":
            own = replace(image_sampler, options=SamplerOptions("dpm++", 20), seed=seed_of("calibration"))
            images = generate(own, range(IMAGES), batch_size).images
        else:
            some = split.train_indices[np.linspace(0, len(split.train_indices) - 1, IMAGES).astype(int)]
            images = to_model_range(torch.from_numpy(image_set.images[some]))
        made = calibrate(denoiser, images.to(image_sampler.device), batch_size)
        write_tensors(path, vars(made), made_from)
        print(f"wrote {path}")
        return made

    calibration = processes.from_main(read_or_make) if which else None
    return replace(image_sampler, denoiser=replace(denoiser, calibration=calibration))
