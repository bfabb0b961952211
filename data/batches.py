"""Shuffle the images of each epoch, and copy batches to the device."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


# The next step of an epoch needs the same order.
@lru_cache(maxsize=1)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of an epoch's n images: an int64 permutation (n,), by seed and epoch."""
    # The images are sorted by random 64-bit keys. NumPy guarantees that Philox and SeedSequence
    # give the same numbers in every version and on every platform, but does not guarantee this for
    # permutation().
    generator = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    return np.argsort(generator.random_raw(n), kind="stable")


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
