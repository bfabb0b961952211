"""Measure how fast batches of uint8 images reach the training device.

    python benchmarks/data_feeding.py [--photos 4200] [--batch-size 80] [--workers N] [--rounds 5]

A plain DataLoader over PNGs is compared with the packed file. They take turns, A B A B, with
shuffled synthetic photos in a temporary folder that the system has cached. Then the float
conversion and the augmentation are measured, which run on the training device.
"""

import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, RandomSampler

# Python looks for modules in this script's folder, not in the repository's root.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.augmentation import augment
from data.batches import ImageFeeder, epoch_order
from data.datasets import load_images
from data.pixels import to_model_range
from functions.support.command_line import Parser, positive

IMAGE_SIZE = 128
# The length of a round, which is long compared with the few batches prefetched at its start.
PNG_BATCHES = 100
PACKED_IMAGES = 20_000


class PngFiles(list):
    """A data set over paths of image files: each access opens and decodes a file, as is usual."""

    def __getitem__(self, index: int) -> torch.Tensor:
        image = Image.open(super().__getitem__(index))
        return torch.from_numpy(np.array(image.convert("RGB")))


def make_photos(folder: Path, count: int) -> list[Path]:
    """Write PNGs of about the size of photos in bytes, and return their paths."""
    rng = np.random.default_rng(0)
    size = (IMAGE_SIZE, IMAGE_SIZE)
    frequency = np.fft.fftfreq(IMAGE_SIZE)
    radius = np.maximum(np.hypot(frequency[:, None], frequency), 1 / IMAGE_SIZE)

    folder.mkdir()
    paths = [folder / f"{index:05d}.png" for index in range(count)]
    for path in paths:
        # Like a photo, this noise has less power at higher frequencies, so PNG can compress it.
        spectrum = np.fft.fft2(rng.standard_normal(size)) / radius**1.2
        grey = np.fft.ifft2(spectrum).real
        tinted = 128 + 45 * grey[..., None] / grey.std() + rng.normal(0, 2, (*size, 3))
        Image.fromarray(tinted.clip(0, 255).astype(np.uint8)).save(path)
    return paths


def index_batches(count: int, batch_size: int, total: int) -> Iterator[np.ndarray]:
    """Yield shuffled batches of indices below `count`, over epochs, up to `total` or more."""
    index_count = 0
    for epoch in itertools.count():
        order = epoch_order(count, 0, epoch)
        # An incomplete batch at the end of an epoch is dropped.
        for i in range(0, count - batch_size + 1, batch_size):
            yield order[i : i + batch_size]
            index_count += batch_size
            if index_count >= total:
                return


def images_per_second(batches: Iterable[torch.Tensor], device: torch.device) -> float:
    """Copy all batches to the device, and return the images per second."""
    # The first batch waits for workers and threads to start, so it does not count.
    batches = iter(batches)
    next(batches)

    start = time.perf_counter()
    image_count = 0
    for batch in batches:
        image_count += len(batch.to(device, non_blocking=True))
    if device.type == "cuda":
        torch.cuda.synchronize()
    return image_count / (time.perf_counter() - start)


def print_rates(name: str, rates: list[float], unit: str = "images/s") -> None:
    """Print the median, the minimum and the maximum of the rates."""
    print(f"{name:<32} {median(rates):>10,.0f} {unit}   ({min(rates):,.0f} to {max(rates):,.0f})")


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--photos", type=positive, default=4200)
    parser.add_argument("--batch-size", type=positive, default=80)
    parser.add_argument(
        "--workers",
        type=positive,
        default=os.cpu_count(),
        help="The number of processes of the DataLoader. Default: the number of cores.",
    )
    parser.add_argument("--rounds", type=positive, default=5)
    options = parser.parse_args()
    batch_size = options.batch_size
    if options.photos < 2 * batch_size:
        parser.error(f"two batches of {batch_size} need more than {options.photos} photos")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as temporary:
        paths = make_photos(Path(temporary) / "photos", options.photos)
        loader = DataLoader(
            PngFiles(paths),
            batch_size,
            sampler=RandomSampler(paths, num_samples=PNG_BATCHES * batch_size),
            num_workers=options.workers,
            pin_memory=device.type == "cuda",
        )
        images = load_images(str(paths[0].parent), IMAGE_SIZE).images
        feeder = ImageFeeder(images, device)

        def packed_rate(total):
            batches = index_batches(len(images), batch_size, total)
            return images_per_second(feeder.feed(batches), device)

        # A pass over all images brings the packed file into the system's cache.
        packed_rate(len(images))
        png_rates, packed_rates = [], []
        for _ in range(options.rounds):
            png_rates.append(images_per_second(loader, device))
            packed_rates.append(packed_rate(PACKED_IMAGES))
        batch = feeder.gather(np.arange(min(batch_size, len(images))))

    print(f"{len(images):,} photos, batches of {batch_size}, {os.cpu_count()} cores, onto {device}")
    print_rates(f"A  DataLoader, {options.workers} workers", png_rates)
    print_rates("B  packed file", packed_rates)
    ratios = [packed / png for png, packed in zip(png_rates, packed_rates, strict=True)]
    print_rates("B / A", ratios, "times")

    x_0 = to_model_range(batch)
    flip = torch.arange(len(batch), device=device) % 2 == 0
    angle = torch.linspace(-3, 3, len(batch), device=device)
    for name, work in (
        ("to floats in [-1, 1]", lambda: to_model_range(batch)),
        ("flips", lambda: augment(x_0, flip)),
        ("flips and rotations", lambda: augment(x_0, flip, angle)),
    ):
        # A rate is measured over three batches, as the first of four does not count.
        rounds = range(options.rounds)
        print_rates(name, [images_per_second((work() for _ in range(4)), device) for _ in rounds])


if __name__ == "__main__":
    main()
