"""Batches of uint8 images by index: which images (shuffling), and onto the device (feeding)."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from data.packed import map_ahead

# All images stay on a GPU if they take at most this part of its free memory, so a GPU with 16 GB
# keeps FFHQ at 128 px.
FREE_MEMORY_FRACTION = 0.25


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of an epoch's n images: an int64 permutation (n,).

    It is a pure function of its arguments. Raises ValueError when seed or epoch is negative.
    """
    # The images are sorted by random keys of 64 bits. NumPy guarantees that Philox and
    # SeedSequence never change between versions and platforms; for its own permutation() it
    # doesn't.
    generator = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    return np.argsort(generator.random_raw(n), kind="stable")


def forward_passes(share: range, batch_size: int) -> list[slice]:
    """Cut a process's share of the places in an effective batch into forward passes.

    Each pass takes at most batch_size images.
    """
    return [slice(first, min(first + batch_size, share.stop)) for first in share[::batch_size]]


def micro_batches(
    train_indices: np.ndarray,
    seed: int,
    effective_batch: int,
    passes: Sequence[slice],
    steps: range,
) -> Iterator[np.ndarray]:
    """Yield the image indices of every forward pass of the given optimiser steps.

    Each step yields one array for each of `passes`. It takes the next effective_batch images of
    its epoch's order; those left over at an epoch's end are dropped.
    """
    # The number of the step alone says where in the data it begins, so a run can resume anywhere.
    steps_per_epoch = len(train_indices) // effective_batch
    epoch = None
    for step in steps:
        if step // steps_per_epoch != epoch:
            epoch = step // steps_per_epoch
            order = train_indices[epoch_order(len(train_indices), seed, epoch)]
        first = step % steps_per_epoch * effective_batch
        for batch_slice in passes:
            yield order[first + batch_slice.start : first + batch_slice.stop]


class ImageFeeder:
    """Hand out batches of images (N, S, S, 3) uint8, memory-mapped or not, on a device.

    keep_on_device=True copies the whole set there at once; False gathers each batch on the CPU.
    None, the default, keeps the set on a CUDA device when it takes no more than
    FREE_MEMORY_FRACTION of the memory that is free there.
    """

    def __init__(
        self, images: np.ndarray, device: torch.device | str, keep_on_device: bool | None = None
    ):
        self.device = torch.device(device)
        self.on_cuda = self.device.type == "cuda"

        # A plain array gathers faster: np.memmap's class does bookkeeping for every result.
        self.images = np.asarray(images)

        if keep_on_device is None:
            free_bytes = torch.cuda.mem_get_info(self.device)[0] if self.on_cuda else 0
            keep_on_device = self.images.nbytes <= FREE_MEMORY_FRACTION * free_bytes
        self.resident = None
        if keep_on_device:
            self.resident = torch.tensor(self.images, device=self.device)

    def gather(self, indices: np.ndarray) -> Tensor:
        """Return the images of indices (B,) as uint8 (B, S, S, 3) on the device.

        Raises IndexError when an index is out of range.
        """
        if self.resident is None:
            return self.send(self.gather_on_cpu(indices))
        indices = torch.from_numpy(self.checked(indices))
        if self.on_cuda:
            indices = indices.pin_memory()
        return self.resident.index_select(0, self.send(indices))

    def feed(self, batches_of_indices: Iterable[np.ndarray]) -> Iterator[Tensor]:
        """Yield `gather` of each batch of indices, in order."""
        if self.resident is not None:
            yield from map(self.gather, batches_of_indices)
        else:
            # A thread gathers the next batch while the device works on this one.
            yield from map(
                self.send, map_ahead(self.gather_on_cpu, batches_of_indices, threads=1, ahead=1)
            )

    def gather_on_cpu(self, indices: np.ndarray) -> Tensor:
        """Return the images of indices (B,) on the CPU, in pinned memory if a GPU gets them."""
        indices = self.checked(indices)
        shape = (len(indices), *self.images.shape[1:])
        batch = torch.empty(shape, dtype=torch.uint8, pin_memory=self.on_cuda)

        # With mode="raise" NumPy would copy the batch once more. The indices are checked above,
        # so mode="clip" never clips.
        np.take(self.images, indices, axis=0, out=batch.numpy(), mode="clip")
        return batch

    def checked(self, indices: np.ndarray) -> np.ndarray:
        """Return indices as int64. Raises IndexError when one is out of range."""
        indices = np.asarray(indices, dtype=np.int64)
        if np.any((indices < 0) | (indices >= len(self.images))):
            raise IndexError(f"an image index is out of range 0..{len(self.images) - 1}")
        return indices

    def send(self, batch: Tensor) -> Tensor:
        """Copy a batch to the device; the CPU does not wait for a copy to a GPU."""
        # PyTorch's pinned-memory allocator hands the buffer out again only after this copy is done.
        return batch.to(self.device, non_blocking=self.on_cuda)
