"""Batches of uint8 images by index: which ones (shuffling), and onto the device that trains (feeding)."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from data.packed import map_ahead

# Of a GPU's, up to which all images are kept there: FFHQ at 128 px on one with 16 GB
FREE_MEMORY_FRACTION = 0.25
COPY_CHUNK = 1024  # images a time when the whole set goes to the device


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """Order the n images of an epoch: an int64 permutation (n,), a pure function of its arguments.

    The images sorted by 64-bit random keys, drawn from NumPy's Philox seeded by SeedSequence([seed, epoch]). NumPy
    guarantees these two never to change between versions and platforms, which it doesn't for its own permutation().
    Raises ValueError when seed or epoch is negative.
    """
    keys = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(n)
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


def forward_passes(share: range, batch_size: int) -> list[slice]:
    """Cut a process's share of the places in an effective batch into passes of up to batch_size images."""
    return [slice(first, min(first + batch_size, share.stop)) for first in share[::batch_size]]


def micro_batches(
    train_indices: np.ndarray,
    seed: int,
    effective_batch: int,
    passes: Sequence[slice],
    steps: range,
) -> Iterator[np.ndarray]:
    """Yield the images of every forward pass of some optimiser steps, an array of indices for each of `passes`.

    A step takes the next effective_batch images of its epoch's order; what is left at an epoch's end is dropped. So
    the position in the data is the number of the step, and nothing else.
    """
    steps_per_epoch = len(train_indices) // effective_batch
    epoch, order = None, None
    for step in steps:
        if step // steps_per_epoch != epoch:
            epoch = step // steps_per_epoch
            order = train_indices[epoch_order(len(train_indices), seed, epoch)]
        first = step % steps_per_epoch * effective_batch
        for places in passes:
            yield order[first + places.start : first + places.stop]


class ImageFeeder:
    """Hand out batches of images (N, S, S, 3) uint8, memory-mapped or not, on a device.

    keep_on_device=True copies the whole set there at once; False gathers each batch on the CPU and, for a GPU, sends
    it from pinned memory without waiting. None, the default, keeps it on a CUDA device when it takes no more than
    FREE_MEMORY_FRACTION of the memory free there.
    """

    def __init__(
        self, images: np.ndarray, device: torch.device | str, keep_on_device: bool | None = None
    ):
        self.device = torch.device(device)
        # Without memmap's own class, whose bookkeeping slows every gather
        self.images = np.asarray(images)
        if keep_on_device is None:
            free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 0
            keep_on_device = self.images.nbytes <= FREE_MEMORY_FRACTION * free
        self.resident = self.copy_to_device() if keep_on_device else None

    def gather(self, indices: np.ndarray) -> torch.Tensor:
        """Gather images by their indices (B,) -> uint8 (B, S, S, 3) on the device. Raises IndexError out of range."""
        if self.resident is None:
            return self.send(self.gather_on_cpu(indices))
        indices = torch.from_numpy(self.checked(indices))
        if self.device.type == "cuda":
            indices = indices.pin_memory()
        return self.resident.index_select(0, self.send(indices))

    def feed(self, batches_of_indices: Iterable[np.ndarray]) -> Iterator[torch.Tensor]:
        """Yield `gather` of each batch of indices in order; a thread reads the next one meanwhile."""
        if self.resident is not None:
            yield from map(self.gather, batches_of_indices)
        else:
            yield from map(
                self.send, map_ahead(self.gather_on_cpu, batches_of_indices, threads=1, ahead=1)
            )

    def gather_on_cpu(self, indices: np.ndarray) -> torch.Tensor:
        indices = self.checked(indices)
        shape = len(indices), *self.images.shape[1:]
        batch = torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        # mode="clip" spares NumPy a second copy of the batch that it makes to raise errors; they're checked above.
        np.take(self.images, indices, axis=0, out=batch.numpy(), mode="clip")
        return batch

    def checked(self, indices: np.ndarray) -> np.ndarray:
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and not (indices.min() >= 0 and indices.max() < len(self.images)):
            raise IndexError(
                f"image index out of range 0..{len(self.images) - 1}: {indices.min()}..{indices.max()}"
            )
        return indices

    def send(self, batch: torch.Tensor) -> torch.Tensor:
        # PyTorch's pinned-memory allocator doesn't hand the buffer out again before this copy is done.
        return batch.to(self.device, non_blocking=self.device.type == "cuda")

    def copy_to_device(self) -> torch.Tensor:
        resident = torch.empty(self.images.shape, dtype=torch.uint8, device=self.device)
        # In chunks, to need little memory besides
        for start in range(0, len(self.images), COPY_CHUNK):
            chunk = np.array(self.images[start : start + COPY_CHUNK])
            resident[start : start + len(chunk)] = torch.from_numpy(chunk).to(self.device)
        return resident
