"""How fast batches of uint8 images reach the training device: a plain DataLoader over PNGs, and the packed file.

    python benchmarks/data_feeding.py [--photos 4200] [--batch-size 80] [--workers N] [--rounds 5]

The two take turns, A B A B, shuffled, from a warm cache, over synthetic photos in a temporary folder. Then come the
float conversion and the augmentation, which happen on the training device.
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

# Run as a script, Python looks for modules in this folder, not in the repository's root where `data` lies.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.augmentation import augment
from data.batches import ImageFeeder, epoch_order
from data.datasets import load_images
from data.pixels import to_model_range
from functions.support.command_line import Parser, positive

IMAGE_SIZE = 128
# Of a round: so many that the batches ready at its start hardly count
PNG_BATCHES, PACKED_IMAGES = 100, 20_000


class PngFiles(list):
    """Paths of files, and their images as its items: the usual way, every access opens and decodes a file."""

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(np.array(Image.open(super().__getitem__(index)).convert("RGB")))


def make_photos(folder: Path, count: int) -> list[Path]:
    """Write PNGs that take about as many bytes as photos do: noise with a falling spectrum."""
    rng = np.random.default_rng(0)
    frequency = np.fft.fftfreq(IMAGE_SIZE)
    radius = np.maximum(np.hypot(frequency[:, None], frequency), 1 / IMAGE_SIZE)
    folder.mkdir()
    paths = [folder / f"{number:05d}.png" for number in range(count)]
    for path in paths:
        grey = np.fft.ifft2(
            np.fft.fft2(rng.standard_normal((IMAGE_SIZE, IMAGE_SIZE))) / radius**1.2
        ).real
        tinted = (
            128 + 45 * grey[..., None] / grey.std() + rng.normal(0, 2, (IMAGE_SIZE, IMAGE_SIZE, 3))
        )
        Image.fromarray(tinted.clip(0, 255).astype(np.uint8)).save(path)
    return paths


def index_batches(count: int, batch_size: int, images_wanted: int) -> Iterator[np.ndarray]:
    """Shuffled batches of indices, epoch after epoch, until so many images are reached."""
    orders = (epoch_order(count, 0, epoch) for epoch in itertools.count())
    batches = (
        order[i : i + batch_size]
        for order in orders
        for i in range(0, count - batch_size + 1, batch_size)
    )
    return itertools.islice(batches, -(-images_wanted // batch_size))


def rate_of(batches: Iterable[torch.Tensor], device: torch.device) -> float:
    """Images a second, the first batch and the start of what makes it left out."""
    batches = iter(batches)
    next(batches)
    start, images = time.perf_counter(), 0
    for batch in batches:
        images += len(batch.to(device, non_blocking=True))
    if device.type == "cuda":
        torch.cuda.synchronize()
    return images / (time.perf_counter() - start)


def say(name: str, rates: list[float], unit: str = "images/s") -> None:
    print(f"{name:<32} {median(rates):>10,.0f} {unit}   ({min(rates):,.0f} to {max(rates):,.0f})")


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--photos", type=positive, default=4200)
    parser.add_argument("--batch-size", type=positive, default=80)
    parser.add_argument(
        "--workers", type=positive, default=os.cpu_count(), help="of the DataLoader (all cores)"
    )
    parser.add_argument("--rounds", type=positive, default=5)
    options = parser.parse_args()
    if options.photos < 2 * options.batch_size:
        parser.error(f"two batches of {options.batch_size} take more than {options.photos} photos")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as temporary:
        paths = make_photos(Path(temporary) / "photos", options.photos)
        images = load_images(str(paths[0].parent), IMAGE_SIZE).images
        feeder = ImageFeeder(images, device, keep_on_device=False)
        sampler = RandomSampler(paths, num_samples=PNG_BATCHES * options.batch_size)
        loader = DataLoader(
            PngFiles(paths),
            options.batch_size,
            sampler=sampler,
            num_workers=options.workers,
            pin_memory=device.type == "cuda",
        )
        packed = lambda wanted: feeder.feed(index_batches(len(images), options.batch_size, wanted))
        rate_of(packed(len(images)), device)  # warms the cache
        rounds = [
            (rate_of(loader, device), rate_of(packed(PACKED_IMAGES), device))
            for _ in range(options.rounds)
        ]
        batch = feeder.gather(np.arange(min(options.batch_size, len(images))))
    print(
        f"{len(images):,} photos, batches of {options.batch_size}, {os.cpu_count()} cores, onto {device}"
    )
    say(f"A  DataLoader, {options.workers} workers", [png for png, _ in rounds])
    say("B  packed file", [pack for _, pack in rounds])
    say("B / A", [pack / png for png, pack in rounds], "times")
    x_0 = to_model_range(batch)
    flip = torch.arange(len(batch), device=device) % 2 == 0
    angle = torch.linspace(-3, 3, len(batch), device=device)
    for name, work in (
        ("to floats in [-1, 1]", lambda: to_model_range(batch)),
        ("flips", lambda: augment(x_0, flip)),
        ("flips and rotations", lambda: augment(x_0, flip, angle)),
    ):
        say(name, [rate_of((work() for _ in range(4)), device) for _ in range(options.rounds)])


if __name__ == "__main__":
    main()
