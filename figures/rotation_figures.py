"""Compare the usual rotation of images with ours (data/augmentation.py).

docs/ffhq.md shows these figures, and make_figures.py draws them.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data.augmentation import augment
from data.datasets import load_images
from data.pixels import to_model_range, to_uint8
from functions.support.pictures import plt, save_figure
from functions.support.random_numbers import generator_of

# This value is broadcast to all images of a batch.
NO_FLIP = torch.zeros(1, dtype=torch.bool)


def draw_rotation(figures: Path) -> None:
    """Draw embedded faces rotated in the usual way, which has black corners, and in ours.

    Each row is an image. The columns are the original, then both ways at 3 and at 10 degrees.
    """
    images = load_images("emoji_faces", 64).images[[500, 800, 300]]
    x_0 = to_model_range(torch.from_numpy(images))

    pictures = [Image.fromarray(image) for image in images]
    columns = {"original": images}
    # Training draws angles up to 3 degrees. At 10 degrees the corners are easier to see.
    for degrees in (3, 10):
        usual = [picture.rotate(degrees, Image.Resampling.BICUBIC) for picture in pictures]
        columns[f"{degrees} degrees, black corners"] = np.stack(usual)

        # Training draws an angle for each image. Here all images have the same angle.
        angle = torch.full((len(images),), float(degrees))
        ours = augment(x_0, NO_FLIP, angle)
        columns[f"{degrees} degrees, ours"] = to_uint8(ours).numpy()

    figure, axes = plt.subplots(len(images), len(columns), figsize=(10, 6.2))
    for column, (title, rotated) in zip(axes.T, columns.items(), strict=True):
        column[0].set_title(title, fontsize=9)
        for axis, image in zip(column, rotated, strict=True):
            # Without interpolation the figure shows each of the 64 x 64 pixels as a square.
            axis.imshow(image, interpolation="nearest")
            axis.set(xticks=[], yticks=[])

    figure.tight_layout()
    save_figure(figure, figures / "rotation.png")


def draw_rotation_spectrum(photos: str, figures: Path) -> None:
    """Draw the mean power spectrum of up to 600 photos, before and after rotation.

    The photos are rotated by up to 3 degrees, in the usual way and in ours.
    """
    images = np.array(load_images(photos, 128).images[:600])
    x_0 = to_model_range(torch.from_numpy(images))

    generator = generator_of("cpu", 0, "rotation spectrum")
    angle = 6 * torch.rand(len(x_0), generator=generator) - 3

    # `augment` doubles the size of images internally, so all photos at once need too much memory.
    parts = zip(x_0.split(50), angle.split(50), strict=True)
    ours = torch.cat([augment(x, NO_FLIP, a) for x, a in parts])
    curves = {"bicubic, as usual": rotated_as_usual(x_0, angle), "ours": ours}

    # The left panel has the spectra, and the right panel their ratio to that before rotation.
    before = radial_power(x_0)
    frequency = np.linspace(0, 0.5, len(before) + 1)[1:]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    left.semilogy(frequency, before, color="black", label=f"{len(x_0)} photos as they are")

    for name, rotated in curves.items():
        power = radial_power(rotated)
        left.semilogy(frequency, power, label=name)
        right.plot(frequency, power / before, label=name)

    # At a ratio of 1 rotation costs no detail.
    right.axhline(1, color="black", linewidth=0.8)
    left.set(xlabel="cycles per pixel", ylabel="mean power")
    right.set(xlabel="cycles per pixel", ylabel="power after / before rotation", ylim=(0, 1.2))

    for axis in (left, right):
        axis.grid(color="0.92")
        axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    save_figure(figure, figures / "rotation_spectrum.png")


def rotated_as_usual(x_0: Tensor, angle: Tensor) -> Tensor:
    """Return images (N, 3, H, W) rotated by angles (N,) in degrees, with bicubic interpolation."""
    radians = torch.deg2rad(angle)
    cos, sin = radians.cos(), radians.sin()
    zero = torch.zeros_like(radians)

    # The affine matrix (2, 3) of an image is a rotation matrix and a translation of zero.
    turn = torch.stack([cos, -sin, zero, sin, cos, zero], 1).view(-1, 2, 3)

    # Reflection padding avoids an edge, which would add high frequencies to the spectrum.
    grid = F.affine_grid(turn, x_0.shape, align_corners=False)
    return F.grid_sample(x_0, grid, "bicubic", "reflection", align_corners=False)


def radial_power(x: Tensor, rings: int = 32) -> np.ndarray:
    """Return the mean power spectrum of square images (N, 3, H, W) in rings of frequency: (rings,).

    The rings are of equal width, up to 0.5 cycles per pixel.
    """
    size = x.shape[-1]

    # Without a window, the jump between opposite edges would hide all other high frequencies.
    window = torch.hann_window(size, periodic=False)
    x = (x - x.mean((2, 3), keepdim=True)) * window[:, None] * window

    # The Fourier transform of all photos at once needs too much memory.
    powers = [torch.fft.fft2(part).abs().square().mean((0, 1)) for part in x.split(50)]
    power = torch.stack(powers).mean(0)

    # The distance of a coefficient from frequency zero gives its ring.
    frequency = torch.fft.fftfreq(size)
    radius = (frequency[:, None] ** 2 + frequency**2).sqrt()
    ring = (radius * 2 * rings).long()
    return np.array([power[ring == i].mean().item() for i in range(rings)])
