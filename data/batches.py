"""Choose the images of each batch by their indices, and copy batches to the device."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


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


def gather(
    images: np.ndarray, inputs: dict[str, np.ndarray], device: torch.device, indices: np.ndarray
) -> tuple[Tensor, dict[str, Tensor]]:
    """Copy the images with indices (B,) int64, and their inputs, to the device.

    `images` are uint8 (N, S, S, C), memory-mapped or not, and `inputs` what the network gets beside
    them, (N, ...) by name. The copies are (B, S, S, C) and (B, ...).
    """

    def copied(values):
        # Gathering from a plain array is faster, because np.memmap does bookkeeping in every call.
        batch = torch.from_numpy(np.asarray(values)[indices])
        if device.type == "cuda":
            # The CPU does not wait for this copy. PyTorch's allocator of pinned memory reuses the
            # buffer only after it is done.
            return batch.pin_memory().to(device, non_blocking=True)
        return batch.to(device)

    return copied(images), {name: copied(values) for name, values in inputs.items()}
