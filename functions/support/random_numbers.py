"""Draw random numbers that depend on their purpose and not on earlier draws.

So the result of a run stays the same when it is resumed, split over processes, or cut into other
micro-batches. Every generator is seeded by (seed, purpose, step) or (seed, purpose, image), and no
generator's state has to be saved.
"""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def seed_of(seed: int, purpose: str, index: int) -> int:
    """Return the 32-bit seed of a purpose's draw with this index, such as a step or an image.

    It is (hash(seed, purpose) + index) mod 2^32, on every machine and in every Python version.
    """
    # PyTorch's generator for CPUs uses only 32 bits of a seed. If the index were hashed, too, two
    # of 50,000 images would have the same seed, and so be identical, with a chance of 25%.
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=4).digest()
    return (int.from_bytes(digest, "little") + index) % 2**32


def generator_of(
    device: torch.device | str, seed: int, purpose: str, index: int = 0
) -> torch.Generator:
    """Return a generator on `device`, seeded by `seed_of`."""
    return torch.Generator(device).manual_seed(seed_of(seed, purpose, index))


def image_noise(
    seed: int, indices: Sequence[int], shape: Sequence[int], device: torch.device, purpose: str
) -> Callable[[], Tensor]:
    """Return a function that draws the next standard normal noise of a batch, (B, C, H, W).

    `indices` are the indices of the batch's images, and `shape` is (C, H, W). The k-th noise of
    image i depends only on (seed, purpose, i, k), and not on the other images in the batch.
    """
    # The CPU draws for every device, so that sampling starts from the same x_T on all devices.
    generators = [generator_of("cpu", seed, purpose, i) for i in indices]

    def noise():
        draws = torch.stack([torch.randn(shape, generator=each) for each in generators])
        if device.type != "cuda":
            return draws.to(device)
        # The copy from pinned memory does not block the CPU, so the CPU draws the next step's noise
        # while the GPU computes this step.
        return draws.pin_memory().to(device, non_blocking=True)

    return noise
