"""Draw random numbers that depend on their purpose and not on earlier draws.

If a run drew all its random numbers from one stream, its result would change when it is resumed,
split over processes, or cut into other micro-batches. So every generator is seeded by
(seed, purpose, step) or (seed, purpose, image), and no generator's state has to be saved.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


def seed_of(seed: int, purpose: str, index: int = 0) -> int:
    """Return the 32-bit seed of a purpose's draw with this index, such as a step or an image.

    It is (hash(seed, purpose) + index) mod 2^32, on every machine and in every Python version.
    """
    # PyTorch's generator for CPUs uses only 32 bits of a seed. If the index were hashed, too, two
    # of 50,000 images would probably have the same seed, and so be identical.
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=4).digest()
    return (int.from_bytes(digest, "little") + index) % 2**32


def generator_of(
    device: torch.device | str, seed: int, purpose: str, index: int = 0
) -> torch.Generator:
    """Return a generator on `device`, seeded by `seed_of`."""
    return torch.Generator(device).manual_seed(seed_of(seed, purpose, index))


@dataclass(frozen=True)
class StepDraws:
    """The random numbers of one optimiser step, for its B images."""

    t: Tensor  # (B,) int64, uniform in 0 .. T-1
    noise: Tensor  # (B, C, H, W) float32, standard normal
    flip: Tensor  # (B,) bool, True with probability 1/2
    # (B,) float32, uniform in [-1, 1). The rotation is this fraction of the largest angle.
    rotation: Tensor

    def cut(self, share: range) -> "StepDraws":
        """Return the draws of a contiguous share of the images."""
        draws = [getattr(self, field.name)[share.start : share.stop] for field in fields(self)]
        return StepDraws(*draws)


def training_draws(
    seed: int,
    step: int,
    effective_batch: int,
    image_shape: Sequence[int],
    timesteps: int,
    device: torch.device | str,
) -> StepDraws:
    """Draw t and noise (Algorithm 1, lines 3 and 4) and the augmentation for an effective batch."""
    # The draws are made for the whole effective batch and cut later. So an image's draws depend on
    # its place in the effective batch, but not on the batch size.
    generator = generator_of(device, seed, "training", step)

    # These four draws come from one generator, so another draw between them, or another order,
    # would change every run. A new field needs a separate generator:
    # generator_of(device, seed, f"training {NAME}", step).
    options = {"generator": generator, "device": device}
    return StepDraws(
        t=torch.randint(timesteps, (effective_batch,), **options),
        noise=torch.randn(effective_batch, *image_shape, **options),
        flip=torch.rand(effective_batch, **options) < 0.5,
        rotation=2 * torch.rand(effective_batch, **options) - 1,
    )


class ImageNoise:
    """The noise for the images of a batch.

    `indices` are the indices of the batch's images, and `shape` is (C, H, W). The k-th noise of
    image i depends only on (seed, purpose, i, k), and not on the other images in the batch.
    """

    def __init__(
        self,
        seed: int,
        indices: Sequence[int],
        shape: tuple,
        device: torch.device | str = "cpu",
        purpose: str = "image",
    ):
        # The CPU draws for every device, so that sampling starts from the same x_T on all devices.
        self.generators = [generator_of("cpu", seed, purpose, i) for i in indices]
        self.shape = shape
        self.device = torch.device(device)

    def draw(self) -> Tensor:
        """Return the next standard normal noise, (B, C, H, W)."""
        draws = [torch.randn(self.shape, generator=generator) for generator in self.generators]
        noise = torch.stack(draws)
        if self.device.type != "cuda":
            return noise.to(self.device)
        # The copy from pinned memory does not block the CPU, so the CPU draws the next step's noise
        # while the GPU computes this step.
        return noise.pin_memory().to(self.device, non_blocking=True)
