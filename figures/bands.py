"""Measure how well a network knows x_0 at each timestep, in bands of spatial frequency.

    python -m figures.bands [RUN]

The bands are the image's mean and octaves of frequency. The network predicts x_0 for held-out
images, without clipping. In each band, the squared error of this prediction is divided by that of
the average training image. A ratio of 1 means that the network knows nothing of the image, and a
ratio above 1 is a fault.

docs/whole-before-detail.md explains the measure.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor
from tqdm import tqdm

from data.pixels import to_model_range
from functions.denoiser import Predictor
from functions.evaluation.bits_per_dim import error_of_mean, evenly_spaced
from functions.evaluation.results import common_settings, write_results
from functions.sampling.calibration import with_calibration
from functions.sampling.generation import batches_of, open_sampler
from functions.sampling.options import (
    SamplerOptions,
    add_out_flag,
    add_sampling_flags,
    given_options,
)
from functions.saved.loading import load_and_split
from functions.saved.run_folder import results_folder
from functions.spectra import band_sums, octaves, spectrum
from functions.support.command_line import Parser, exit_on_user_error, positive
from functions.support.device import precision_name
from functions.support.errors import UserError
from functions.support.pictures import save_figure
from functions.support.processes import SINGLE_PROCESS
from functions.support.random_numbers import ImageNoise

# At most this many timesteps are measured.
TIMES = 12
# At each timestep at least this many (image, noise) pairs are measured. With fewer held-out images,
# each image is used several times, with different noise.
DRAWS = 500
# The average image is computed from this many training images, evenly spaced.
AVERAGE_COUNT = 2000


@dataclass(frozen=True)
class BandErrors:
    """The ratios in each band at K timesteps, as float64 arrays."""

    t: list[int]  # (K,)
    # The names "mean", "1-2", "2-4", ..., "finest", in cycles per image.
    bands: list[str]
    # (K, bands): the squared error of the network's x_0, divided by the average image's.
    ratio: np.ndarray
    # (K, bands): the standard error of `ratio`, over images.
    standard_error: np.ndarray
    # (bands,): the squared error of the average image, per coefficient of the orthonormal Fourier
    # transform.
    variance: np.ndarray

    def table(self) -> str:
        """Return the ratios as a table in plain text, with a line for each timestep."""
        titles = "".join(f"{name:>18}" for name in self.bands)
        lines = [f"     t  {titles}"]
        for k, t in enumerate(self.t):
            line = f"{t:>6}  "
            for ratio, error in zip(self.ratio[k], self.standard_error[k], strict=True):
                cell = f"{ratio:.3g} ± {error:.1g}"
                line += f"{cell:>18}"
            lines.append(line)
        return "\n".join(lines)

    def facts(self) -> dict:
        """Return the fields as plain lists, for a JSON file."""
        return {name: np.asarray(value).tolist() for name, value in vars(self).items()}


def main() -> None:
    """Measure a model's errors, print the table, and write the numbers and a heat map."""
    parser = Parser(description=__doc__)
    add_sampling_flags(parser)
    add_out_flag(parser)
    parser.add_argument("--data", metavar="NAME|PATH", help="Another copy of the model's images.")
    parser.add_argument("--images", type=positive, metavar="N", help="How many held-out images.")
    args = parser.parse_args()
    # Each measurement is a single network call, so flags of a sampler would have no effect.
    options = SamplerOptions(**given_options(args))
    if replace(options, calibrate=None) != SamplerOptions():
        raise UserError("bands measure single network calls, without a sampler and a guide")
    saved, image_sampler = open_sampler(args, SINGLE_PROCESS)
    image_sampler = with_calibration(image_sampler, saved)
    image_set, split = load_and_split(saved, args.data)
    print(split.description)

    def load_x_0(indices):
        images = torch.from_numpy(image_set.images[indices])
        return to_model_range(images.to(image_sampler.device))

    # The mean of the pixels takes less memory than the images in float32.
    pixels = image_set.images[evenly_spaced(split.train_indices, AVERAGE_COUNT)].mean(axis=0)
    average = to_model_range(torch.from_numpy(pixels[None]))[0]
    indices = evenly_spaced(split.val_indices, args.images)
    denoiser = image_sampler.denoiser
    batch_size = image_sampler.batch_size
    # The measurement may take hours. So an error of the folder comes first.
    folder = args.out or results_folder(saved, "evaluation")
    folder.mkdir(parents=True, exist_ok=True)
    result = measure_bands(denoiser, load_x_0, indices, average, batch_size, args.seed)

    print("squared error of x_0 / squared error of the average image, by t and cycles per image")
    print(result.table())
    settings = {
        **common_settings(saved, split, len(indices)),
        "seed": args.seed,
        "precision": precision_name(image_sampler.precision),
        "calibrate": args.calibrate,
    }
    path = write_results(folder / saved.name, "bands", settings, result.facts())
    picture = path.with_suffix(".png")
    plot_bands(result, picture, saved.name)
    # Both are in the same folder.
    print(f"wrote {path} and {picture.name}")


@torch.no_grad()
def measure_bands(
    denoiser: Predictor,
    load_x_0: Callable[[np.ndarray], Tensor],
    indices: np.ndarray,
    average: Tensor,
    batch_size: int,
    seed: int,
) -> BandErrors:
    """Measure the network's squared error of x_0, divided by the average training image's.

    Raises UserError for a single held-out image, because one image has no standard error.

    Args:
        load_x_0: image indices (B,) -> x_0 (B, C, H, W) in [-1, 1], on the model's device.
        indices: the held-out images, (N,).
        average: the average training image (C, H, W).
    """
    if len(indices) < 2:
        raise UserError("bands needs at least two held-out images")
    scheduler = denoiser.scheduler
    average = average.to(load_x_0(indices[:1]).device)

    # (N, bands): the squared error of the average image for each held-out image.
    parts = []
    for batch in batches_of(indices, batch_size):
        x_0 = load_x_0(batch)
        parts.append(band_energy(x_0 - average))
    average_errors = torch.cat(parts)

    # The draws repeat the whole list of images, so each image is used equally often.
    drawn_indices = np.tile(indices, math.ceil(DRAWS / len(indices)))

    def errors_at(t, draws):
        """Return the squared errors of the network's x_0 for these draws at t: (B, bands)."""
        x_0 = load_x_0(drawn_indices[draws])
        noise = ImageNoise(seed, draws, x_0.shape[1:], x_0.device, f"bands {t}").draw()
        x_t = scheduler.q_sample(x_0, t, noise)
        predicted_x_0, _ = denoiser.predict(x_t, t)
        return band_energy(predicted_x_0 - x_0)

    times = measured_timesteps(scheduler.timesteps)
    count = len(drawn_indices)
    errors = average_errors.new_zeros(len(times), count, average_errors.shape[1])
    for k, t in enumerate(tqdm(times, "bands", unit="timestep")):
        batches = batches_of(range(count), batch_size)
        errors[k] = torch.cat([errors_at(t, draws) for draws in batches])

    # The errors of each image's draws are averaged: (K, draws, bands) becomes (K, N, bands).
    network_errors = errors.unflatten(1, (-1, len(indices))).mean(dim=1).numpy()
    return compare_errors(times, network_errors, average_errors.numpy())


def measured_timesteps(timesteps: int) -> list[int]:
    """Return TIMES timesteps of 0 .. T-1, or fewer for a small T.

    They are Chebyshev points, which are densest at both ends.
    """
    angles = np.linspace(0, np.pi, TIMES)
    fractions = (1 - np.cos(angles)) / 2
    t = (fractions * (timesteps - 1)).round().astype(int)
    # For a small T, several points may be the same timestep.
    return np.unique(t).tolist()


def band_energy(images: Tensor) -> Tensor:
    """Return the mean power in each band of the spectra of images (B, C, H, W): (B, bands)."""
    power = spectrum(images).abs().square().mean(dim=1)
    # A sum over a band, divided by the band's number of frequencies, is its mean.
    size = images.shape[-1]
    counts = octaves(size).flatten().bincount()
    return band_sums(power) / counts


def compare_errors(
    t: list[int], network_errors: np.ndarray, average_errors: np.ndarray
) -> BandErrors:
    """Divide the network's squared errors (K, N, bands) by the average image's (N, bands)."""
    s2 = average_errors.mean(axis=0)
    ratio = network_errors.mean(axis=1) / s2

    # Both means are over the same images. The delta method gives the standard error of their ratio.
    residuals = network_errors - ratio[:, None] * average_errors
    standard_error = error_of_mean(residuals.swapaxes(0, 1)) / s2

    names = [f"{2 ** (k - 1)}-{2**k}" for k in range(1, len(s2) - 1)]
    return BandErrors(t, ["mean", *names, "finest"], ratio, standard_error, s2)


def plot_bands(result: BandErrors, path: Path, title: str) -> None:
    """Save a heat map of the ratios. Red cells are worse than the average image.

    A frame marks a cell whose ratio is above 1 by more than two standard errors.
    """
    # Two dollars in the name would enclose mathematics.
    name = title.replace("$", r"\$")
    figure = Figure(figsize=(10, 1.2 + 0.55 * len(result.bands)))
    axis = figure.subplots()
    axis.imshow(
        result.ratio.T,
        cmap="RdBu_r",
        norm=LogNorm(1e-2, 1e2),
        aspect="auto",
        interpolation="nearest",
    )
    for (k, band), ratio in np.ndenumerate(result.ratio):
        # The colours at both ends of the scale are dark, so the text on them is white.
        color = "black" if 1 / 30 < ratio < 30 else "white"
        axis.text(k, band, f"{ratio:.3g}", ha="center", va="center", fontsize=8, color=color)
        if ratio - 2 * result.standard_error[k, band] > 1:
            corner = (k - 0.49, band - 0.48)
            axis.add_patch(Rectangle(corner, 0.98, 0.96, fill=False, linewidth=1.5))
    axis.set_xticks(range(len(result.t)), map(str, result.t))
    axis.set_yticks(range(len(result.bands)), result.bands)
    axis.set(
        xlabel="t (code)",
        ylabel="cycles per image",
        title=f"{name}: error of $x_0$ / error of the average image",
    )
    figure.tight_layout()
    save_figure(figure, path)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
