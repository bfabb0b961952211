"""Shuffle the images of each epoch, copy batches to the device, and flip and rotate them there."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from data.packed import ImageArray


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
    images: ImageArray, inputs: dict[str, np.ndarray], device: torch.device, indices: np.ndarray
) -> tuple[Tensor, dict[str, Tensor]]:
    """Copy the images with indices (B,) int64, and their inputs, to the device.

    `images` are uint8 (N, S, S, C), in memory or on a disk, and `inputs` what the network gets
    beside them, (N, ...) by name. The copies are (B, S, S, C) and (B, ...).
    """
    # HDF5 reads rising indices only, each of them once.
    rising, places = np.unique(indices, return_inverse=True)

    def copied(values):
        if isinstance(values, np.ndarray):
            # Gathering from a plain array is faster, because np.memmap does bookkeeping in every
            # call.
            rows = np.asarray(values)[indices]
        else:
            rows = np.asarray(values[rising])[places]
        batch = torch.from_numpy(rows)
        if device.type == "cuda":
            # The CPU does not wait for this copy. PyTorch's allocator of pinned memory reuses the
            # buffer only after it is done.
            return batch.pin_memory().to(device, non_blocking=True)
        return batch.to(device)

    return copied(images), {name: copied(values) for name, values in inputs.items()}


def augment(x_0: Tensor, flip: Tensor, angle: Tensor | None = None) -> Tensor:
    """Flip and rotate each image of a batch x_0 (B, C, S, S), float32 in [-1, 1].

    Left and right are exchanged where flip (B,) bool is true. angle (B,) is in degrees, positive
    counter-clockwise, or None for no rotation. At an angle of 0 an image stays exactly the same.
    """
    x_0 = torch.where(flip[:, None, None, None], x_0.flip(-1), x_0)
    if angle is None:
        return x_0

    # Interpolation rounds even at an angle of 0, so upright images bypass it.
    return torch.where((angle == 0)[:, None, None, None], x_0, rotate(x_0, angle))


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate each image of x (B, C, S, S) about its centre by its angle (B,) in degrees.

    Wedges from outside the image come into view, and are filled by mirroring it at its edges: a
    model would learn black ones. Bicubic interpolation blurs: photos lose 10% of their
    gradient energy.
    """
    # The matrices (B, 2, 3) lead from a point (x, y, 1) of the output to its place in the input.
    # The y axis points down, so these signs rotate counter-clockwise.
    cos = torch.deg2rad(angle).cos()
    sin = torch.deg2rad(angle).sin()
    matrices = torch.stack([cos, -sin, 0 * cos, sin, cos, 0 * cos], 1).view(-1, 2, 3)
    grid = affine_grid(matrices, x.shape, align_corners=False)

    rotated = grid_sample(x, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    # Interpolation overshoots at sharp edges.
    return rotated.clamp(-1, 1)
