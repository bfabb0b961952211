"""What rotation does to images: the usual way, and ours (data/augmentation.py), for docs/ffhq.md."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from data.augmentation import augment
from data.datasets import load_images
from data.pixels import to_model_range, to_uint8
from functions.support.pictures import plt, save_figure
from functions.support.random_numbers import generator_of


def draw_rotation(figures: Path) -> None:
    """Embedded faces rotated the usual way, with black corners, and ours."""
    image_set = load_images("emoji_faces", 64)
    images = image_set.images[[500, 800, 300]]
    x_0 = to_model_range(torch.from_numpy(images))
    columns = {"original": images}
    for degrees in (3, 10):
        usual = [
            Image.fromarray(image).rotate(degrees, Image.Resampling.BICUBIC) for image in images
        ]
        columns[f"{degrees} degrees, black corners"] = np.stack(
            [np.asarray(image) for image in usual]
        )
        angle = torch.full((len(images),), float(degrees))
        ours = augment(x_0, torch.zeros(len(images), dtype=torch.bool), angle)
        columns[f"{degrees} degrees, ours"] = to_uint8(ours).numpy()
    figure, axes = plt.subplots(len(images), len(columns), figsize=(10, 6.2))
    for column, (title, pictures) in zip(axes.T, columns.items(), strict=True):
        column[0].set_title(title, fontsize=9)
        for axis, picture in zip(column, pictures, strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
    figure.tight_layout()
    save_figure(figure, figures / "rotation.png")


def draw_rotation_spectrum(photos: str, figures: Path) -> None:
    """The mean power spectrum of up to 600 photos: as they are, and rotated by up to 3 degrees in two ways."""
    image_set = load_images(photos, 128)
    x_0 = to_model_range(torch.from_numpy(np.array(image_set.images[:600])))
    generator = generator_of("cpu", 0, "rotation spectrum")
    angle = 6 * torch.rand(len(x_0), generator=generator) - 3
    radians = torch.deg2rad(angle)
    zero = torch.zeros_like(radians)
    turn = torch.stack(
        [radians.cos(), -radians.sin(), zero, radians.sin(), radians.cos(), zero], 1
    ).view(-1, 2, 3)
    grid = F.affine_grid(turn, list(x_0.shape), align_corners=False)
    curves = {
        "bicubic, as usual": F.grid_sample(x_0, grid, "bicubic", "reflection", align_corners=False),
        "ours": torch.cat(
            [
                augment(x, torch.zeros(len(x), dtype=torch.bool), a)
                for x, a in zip(x_0.split(50), angle.split(50), strict=True)
            ]
        ),
    }
    before = radial_power(x_0)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    frequency = np.linspace(0, 0.5, len(before) + 1)[1:]
    left.semilogy(frequency, before, color="black", label=f"{len(x_0)} photos as they are")
    for name, rotated in curves.items():
        power = radial_power(rotated)
        left.semilogy(frequency, power, label=name)
        right.plot(frequency, power / before, label=name)
    right.axhline(1, color="black", linewidth=0.8)
    left.set(xlabel="cycles per pixel", ylabel="mean power")
    right.set(xlabel="cycles per pixel", ylabel="power after / before rotation", ylim=(0, 1.2))
    for axis in (left, right):
        axis.grid(color="0.92")
        axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    save_figure(figure, figures / "rotation_spectrum.png")


def radial_power(x: torch.Tensor, rings: int = 32) -> np.ndarray:
    """Mean power spectrum of images (N, 3, H, W) in rings of frequency up to 0.5 cycles per pixel."""
    size = x.shape[-1]
    window = torch.hann_window(size, periodic=False)
    # Without a window the jump between opposite edges would cover all high frequencies.
    x = (x - x.mean((2, 3), keepdim=True)) * window[:, None] * window
    power = torch.stack(
        [torch.fft.fft2(part).abs().square().mean((0, 1)) for part in x.split(50)]
    ).mean(0)
    frequency = torch.fft.fftfreq(size)
    ring = ((frequency[:, None] ** 2 + frequency**2).sqrt() * 2 * rings).long()
    return np.array([power[ring == i].mean().item() for i in range(rings)])
