"""How fast batches of uint8 images reach the training device: a plain DataLoader over PNGs, and the packed file.

    python benchmarks/data_feeding.py [SOURCE] [--batch-size 80] [--workers N] [--rounds 5]

The two are measured in turn, A B A B, shuffled, from a warm cache; then the float conversion and the augmentation,
which happen on the training device, apart. SOURCE is a zip or folder of PNGs of one size, as for train.py; without one,
synthetic photos of 128 px are made in a temporary folder.
"""

import argparse
import io
import itertools
import os
import statistics
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

# Run as a script, Python looks for modules in this folder, not in the repository's root where `data` lies.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.augmentation import augment
from data.batches import ImageFeeder, epoch_order
from data.datasets import load_images
from data.pixels import to_model_range

IMAGE_SIZE = 128


class PngFiles(torch.utils.data.Dataset):
    """The usual way: every access opens and decodes a file."""

    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(np.array(Image.open(self.paths[index]).convert("RGB")))


def make_photos(path: Path, count: int) -> None:
    """Writes a zip of PNGs that take about as many bytes as photos do: noise with a falling spectrum."""
    rng = np.random.default_rng(0)
    frequency = np.fft.fftfreq(IMAGE_SIZE)
    radius = np.maximum(np.hypot(frequency[:, None], frequency), 1 / IMAGE_SIZE)
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(count):
            grey = np.fft.ifft2(np.fft.fft2(rng.standard_normal((IMAGE_SIZE, IMAGE_SIZE))) / radius**1.2).real
            tinted = 128 + 45 * grey[..., None] / grey.std() + rng.normal(0, 2, (IMAGE_SIZE, IMAGE_SIZE, 3))
            buffer = io.BytesIO()
            Image.fromarray(tinted.clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
            archive.writestr(f"{number:05d}.png", buffer.getvalue())


def as_png_files(images: np.ndarray, folder: Path) -> list[Path]:
    """The same images as single PNG files, for the DataLoader."""
    paths = [folder / f"{number:05d}.png" for number in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    return paths


def index_batches(count: int, batch_size: int, images_wanted: int):
    """Shuffled batches of indices, epoch after epoch, until so many images are reached."""
    orders = (epoch_order(count, 0, epoch) for epoch in itertools.count())
    batches = (
        order[start : start + batch_size] for order in orders for start in range(0, count - batch_size + 1, batch_size)
    )
    return itertools.islice(batches, -(-images_wanted // batch_size))


def rate_of(batches, device: torch.device) -> float:
    """Images per second over an iterable of batches, its start-up not counted."""
    batches = iter(batches)
    next(batches)
    start, images = time.perf_counter(), 0
    for batch in batches:
        images += len(batch.to(device, non_blocking=True))
    synchronize(device)
    return images / (time.perf_counter() - start)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(function, images: int, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return images / (time.perf_counter() - start)


def describe(name: str, rates: list[float]) -> str:
    return f"{name:<44} {statistics.median(rates):>10,.0f} images/s   ({min(rates):,.0f} to {max(rates):,.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", metavar="SOURCE")
    parser.add_argument("--batch-size", type=int, default=80)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="of the DataLoader, default: all cores")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if options.source is None:
            make_photos(folder / "photos.zip", 600)
        images = load_images(options.source or str(folder / "photos.zip"), IMAGE_SIZE, quiet=True).images
        paths = as_png_files(images, folder)
        print(
            f"{len(images):,} images, {sum(p.stat().st_size for p in paths) / len(paths) / 1000:.0f} kB a PNG, "
            f"batches of {options.batch_size}, {os.cpu_count()} cores, onto {device}, PyTorch {torch.__version__}"
        )

        # So many that the batches which its workers have ready when the clock starts don't count for much.
        sampler = torch.utils.data.RandomSampler(paths, num_samples=100 * options.batch_size)
        loader = torch.utils.data.DataLoader(
            PngFiles(paths),
            options.batch_size,
            sampler=sampler,
            num_workers=options.workers,
            pin_memory=device.type == "cuda",
        )
        feeder = ImageFeeder(images, device, keep_on_device=False)
        for _ in feeder.feed(index_batches(len(images), options.batch_size, len(images))):
            pass  # warms the cache
        plain, ours = [], []
        for _ in range(options.rounds):
            plain.append(rate_of(loader, device))
            ours.append(rate_of(feeder.feed(index_batches(len(images), options.batch_size, 20_000)), device))
        print(describe(f"A  DataLoader over PNGs, {options.workers} workers", plain))
        print(describe("B  packed file", ours))
        if device.type == "cuda":
            resident = ImageFeeder(images, device, keep_on_device=True)
            print(
                describe(
                    "B' packed file, kept on the GPU",
                    [
                        rate_of(resident.feed(index_batches(len(images), options.batch_size, 20_000)), device)
                        for _ in range(options.rounds)
                    ],
                )
            )
        ratios = [b / a for a, b in zip(plain, ours, strict=True)]
        print(f"B / A: {statistics.median(ratios):.0f} times ({min(ratios):.0f} to {max(ratios):.0f})")

        batch = feeder.gather(epoch_order(len(images), 0, 0)[: options.batch_size])
        x_0 = to_model_range(batch)
        flip = torch.arange(len(batch), device=device) % 2 == 0
        angle = torch.linspace(-3, 3, len(batch), device=device)
        for name, function in (
            ("to floats in [-1, 1]", lambda: to_model_range(batch)),
            ("flips", lambda: augment(x_0, flip)),
            ("flips and rotations", lambda: augment(x_0, flip, angle)),
        ):
            function()
            print(describe(name, [timed(function, len(batch), device) for _ in range(options.rounds)]))


if __name__ == "__main__":
    main()
