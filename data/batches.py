"""Choose the images of each batch by their indices, and copy batches to the device."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

# All images stay on a GPU if they need at most this fraction of its free memory. So a GPU with
# 16 GB keeps FFHQ at 128 px.
FREE_MEMORY_FRACTION = 0.25


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of an epoch's n images: an int64 permutation (n,), by seed and epoch."""
    # The images are sorted by random 64-bit keys. NumPy guarantees that Philox and SeedSequence
    # give the same numbers in every version and on every platform, but does not guarantee this for
    # permutation().
    generator = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    return np.argsort(generator.random_raw(n), kind="stable")


def indices_of_steps(
    train_indices: np.ndarray, seed: int, effective_batch: int, share: range, steps: range
) -> Iterator[np.ndarray]:
    """Yield the indices of a process's images in each of the optimiser steps `steps`.

    `share` are the process's places among the effective_batch images of a step. Images left over at
    the end of an epoch are dropped.
    """
    # Which images a step uses depends only on its number, so a run can resume at any step.
    steps_per_epoch = len(train_indices) // effective_batch
    epoch = None
    for step in steps:
        if step // steps_per_epoch != epoch:
            epoch = step // steps_per_epoch
            order = train_indices[epoch_order(len(train_indices), seed, epoch)]
        first = step % steps_per_epoch * effective_batch
        yield order[first + share.start : first + share.stop]


class ImageFeeder:
    """Images (N, S, S, C) uint8, memory-mapped or not, that are fed to a device in batches.

    With them goes what the network gets beside them, `inputs`: (N, ...) by name. A CUDA device
    keeps all images if there is room. Otherwise the CPU gathers each batch.
    """

    def __init__(
        self, images: np.ndarray, device: torch.device, inputs: dict[str, np.ndarray] | None = None
    ):
        self.device = device
        self.inputs = inputs or {}
        self.on_cuda = device.type == "cuda"

        # Gathering from a plain array is faster, because np.memmap does bookkeeping in every call.
        self.images = np.asarray(images)

        self.resident = None
        if self.on_cuda:
            free_bytes, _ = torch.cuda.mem_get_info(device)
            if self.images.nbytes <= FREE_MEMORY_FRACTION * free_bytes:
                self.resident = torch.tensor(self.images, device=device)

    def gather(self, indices: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the images with indices (B,) int64, uint8 (B, S, S, C), and their inputs (B, ...).

        All are on the device.
        """
        inputs = {name: self.on_device(values[indices]) for name, values in self.inputs.items()}
        if self.resident is not None:
            return self.resident[torch.from_numpy(indices)], inputs
        return self.on_device(self.images[indices]), inputs

    def on_device(self, values: np.ndarray) -> Tensor:
        """Copy an array to the device."""
        batch = torch.from_numpy(values)
        if self.on_cuda:
            # The CPU does not wait for this copy. PyTorch's allocator of pinned memory reuses the
            # buffer only after it is done.
            return batch.pin_memory().to(self.device, non_blocking=True)
        return batch.to(self.device)

    def feed(
        self, batches_of_indices: Iterable[np.ndarray]
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Yield the images of each batch of indices on the device, and their inputs, in order."""
        # A thread gathers the next batch while the device works on this one.
        with ThreadPoolExecutor(max_workers=1) as executor:
            gathered = None
            for indices in batches_of_indices:
                previous = gathered
                gathered = executor.submit(self.gather, indices)
                if previous:
                    yield previous.result()
            if gathered:
                yield gathered.result()
